"""TinyBERT's ablation in small, on real data: one student, one budget, an arm for each part that is left out or put in its place.

    teacher  an encoder, fine-tuned on the task          general  a narrow student after general distillation on raw text
    data     the task's texts and N augmented copies     arm      from a start, so many epochs on the layers and on the predictions

Every step is a command of the README. What is there is not made again: teacher, general student, augmented texts and teachers on disk lie
in --work; the score of each arm goes into --json as soon as it is known, and an arm that stands there is passed over. With --jobs so many
commands run at a time, as on a GPU that one of them does not fill; each writes into --work/logs.

    cd $GLUE && python $REPOSITORY/benchmarks/tinybert_ablation.py --tasks mrpc rte --model $MODEL --text wiki.txt --vectors glove.txt \
        --work /tmp/ablation --json $REPOSITORY/benchmarks/results/tinybert_ablation.json [ARM ...]
    python benchmarks/tinybert_ablation.py --json benchmarks/results/tinybert_ablation.json --table
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from datasets import load_dataset
from measuring import machine

STUDENT = ("--num_hidden_layers", "3", "--hidden_size", "192", "--num_attention_heads", "12", "--intermediate_size", "768")
HALF = ("--layers_to_keep", "2,4,6")
# ROSITA's proportions: a sixth of the heads, a quarter of the neurons, a sixth of the width as rank.
PRUNED = ("--num_attention_heads", "2", "--intermediate_size", "384", "--embedding_rank", "64")
SCORES = ("eval_matthews_correlation", "eval_pearson", "eval_accuracy")


@dataclass(frozen=True)
class Arm:
    """One way to train the student.

    Attributes:
        what: in words, for the table.
        start: the weights: "general", "random" or "pca"; or "kept", half of the teacher's layers at its width; or "pruned", of those the
            most important parts.
        augmented: learn from the copies too; else as many steps on the originals alone.
        recipe: None for labels alone, with a plain Trainer.
        more: further flags of the run.
        phases: layers first, predictions after; else all losses in one phase as long as both.
        cache: which teacher on disk it reads: arms that ask for the same layers share one.
        times: so many times the budget's epochs.
    """

    what: str
    start: str = "general"
    augmented: bool = True
    recipe: str | None = "tinybert"
    more: tuple[str, ...] = ()
    phases: bool = True
    cache: str = "tinybert"
    times: float = 1.0


def without(loss: str, *others: str) -> tuple[str, ...]:
    """The flag that leaves losses out."""
    return ("--distill_weights", ",".join(f"{name}=0" for name in (loss, *others)))


ARMS: dict[str, Arm] = {
    "full": Arm("general distillation, augmentation, all losses, uniform map"),
    "no_general": Arm("without general distillation: random weights", start="random"),
    "pca": Arm("in place of general distillation: --init pca", start="pca"),
    "no_task": Arm("without task distillation: fine-tuned on the labels", augmented=False, recipe=None),
    "no_augmentation": Arm("without augmentation: as many steps on the originals", augmented=False),
    "no_attention": Arm("without attention scores", more=without("attention_scores")),
    "no_hidden": Arm("without hidden states", more=without("hidden_states")),
    "no_layers": Arm("without attention scores and hidden states", more=without("attention_scores", "hidden_states")),
    "no_embeddings": Arm("without embeddings", more=without("embeddings")),
    "no_prediction": Arm("without the teacher's predictions: labels in their place", more=("--distill_weights", "logits=0,labels=1")),
    "top": Arm("map top", more=("--distill_layer_map", "top"), cache="top"),
    "bottom": Arm("map bottom", more=("--distill_layer_map", "bottom"), cache="bottom"),
    "skip_heads": Arm("without heads that look at separators (--distill_skip_heads 0.5)", more=("--distill_skip_heads", "0.5")),
    "alone": Arm("alone: random weights, labels", start="random", augmented=False, recipe=None),
    "layerwise": Arm("recipe layerwise", recipe="layerwise", phases=False, cache="layerwise"),
    "distilbert": Arm("recipe distilbert", recipe="distilbert", phases=False, cache="distilbert"),
    "pkd": Arm("recipe pkd", recipe="pkd", phases=False, cache="pkd"),
    "mud": Arm("recipe mud", recipe="mud", cache="mud"),
    "mud_tenth": Arm("recipe mud, 1l_10t_0.1h of the hidden states", recipe="mud", more=("--hsk", "1l_10t_0.1h"), cache="mud_tenth"),
    "minilm": Arm("recipe minilm", recipe="minilm", cache="minilm"),
    "minilmv2": Arm("recipe minilmv2", recipe="minilmv2", cache="minilmv2"),
    "fitnets": Arm("recipe fitnets", recipe="fitnets", cache="fitnets"),
    "ckd": Arm("recipe ckd", recipe="ckd", phases=False, cache="ckd"),
    "alp": Arm("recipe alp", recipe="alp", phases=False, cache="alp"),
    "emd": Arm("recipe emd", recipe="emd", cache="emd"),
    "mobilebert": Arm("recipe mobilebert", recipe="mobilebert", cache="mobilebert"),
    "half_alone": Arm("half of the teacher's layers, labels", start="kept", augmented=False, recipe=None),
    "half": Arm(
        "half of the teacher's layers, recipe layerwise, augmentation", start="kept", recipe="layerwise", phases=False, cache="half"
    ),
    "half_tinybert": Arm("half of the teacher's layers, recipe tinybert, augmentation", start="kept", cache="half_tinybert"),
    "pruned_alone": Arm("pruned (3 layers, 2 heads, 384 neurons, rank 64), labels", start="pruned", augmented=False, recipe=None),
    "pruned": Arm("pruned, recipe mud", start="pruned", recipe="mud", cache="mud"),
    "pruned_tenth": Arm(
        "pruned, recipe mud, 1l_10t_0.1h of the hidden states",
        start="pruned",
        recipe="mud",
        more=("--hsk", "1l_10t_0.1h"),
        cache="mud_tenth",
    ),
    "full_long": Arm("full, five times as long", times=5.0),
    "alone_long": Arm("alone, five times as long", start="random", augmented=False, recipe=None, times=5.0),
    "half_long": Arm(
        "half of the teacher's layers, layerwise, five times as long",
        start="kept",
        recipe="layerwise",
        phases=False,
        cache="half",
        times=5.0,
    ),
}


class Ablation:
    """The commands of one task.

    Args:
        options: see `main`.
        task: the GLUE task.
    """

    def __init__(self, options: argparse.Namespace, task: str) -> None:
        self.options, self.task = options, task
        self.work = Path(options.work).resolve()
        (self.work / "logs").mkdir(parents=True, exist_ok=True)
        self.teacher = self.work / f"teacher-{self.task}"

    def prepare_general(self) -> None:
        """The general student, which all tasks share."""
        if (self.work / "general" / "model.safetensors").exists():
            return
        if not (self.work / "raw" / "config.json").exists():
            self._run("raw", "student", self.options.model, "-o", self.work / "raw", *STUDENT)
        recipe = ("--trainer_class", "DistillTrainer", "--distill_recipe", "tinybert_general", "--mlm_probability", "0")
        rate = ("--learning_rate", self.options.general_learning_rate, "--warmup_steps", "0.1", "--save_strategy", "no")
        models = ("--teacher_model_name_or_path", self.options.model, "--model_name_or_path", self.work / "raw")
        size = ("--max_seq_length", "128", "--num_train_epochs", self.options.general_epochs, "--per_device_train_batch_size", "32")
        files = ("--train_file", self.options.text, "--line_by_line", "--do_train", "--output_dir", self.work / "general")
        self._run("general", "run", "mlm", *recipe, *rate, *models, *size, *files, *self._hardware())

    def prepare_texts(self) -> None:
        """The augmented texts."""
        if not self.augmented.exists():
            source = self.work / f"{self.task}.json"
            texts = load_dataset("nyu-mll/glue", self.task, split="train")
            most = self.options.max_examples or len(texts)
            texts.select(range(min(most, len(texts)))).to_json(source)
            mlm = ("--mlm", self.options.mlm) if self.options.mlm else ()
            words = (*mlm, "--vectors", self.options.vectors, "--num_copies", self.options.copies)
            self._run(f"augment-{self.task}", "augment", source, "-o", self.augmented, *words)

    def prepare_models(self, starts: set[str]) -> None:
        """The teacher, and those of the students that are made of it."""
        if not (self.teacher / "eval_results.json").exists():
            self._glue(self.teacher, self.options.model, 3, 5e-5, 16)
        warm = ("--init", "pca", "--task_name", self.task)
        made = {
            "random": ("student", *STUDENT),
            "pca": ("student", *STUDENT, *warm),
            "kept": ("student", *HALF),
            "pruned": ("prune", *HALF, *PRUNED, "--task_name", self.task),
        }
        for start, (command, *flags) in made.items():
            folder = self.work / f"{start}-{self.task}"
            if start in starts and not (folder / "config.json").exists():
                self._run(folder.name, command, self.teacher, "-o", folder, *flags)

    def build(self, name: str) -> None:
        """The teacher on disk that an arm reads."""
        arm, cache = ARMS[name], self._cache(name)
        if arm.recipe is None or self.options.live or (cache / "manifest.json").exists():
            return
        built = ("--teacher_model_name_or_path", self.teacher, "--teacher_cache_dir", cache, "--build_teacher_cache_only", "True")
        whole = ("--train_file", self.augmented, "--trainer_class", "DistillTrainer", "--distill_recipe", arm.recipe)
        # What a shared teacher on disk holds is the recipe's; an arm with one of its own says what.
        mapped = arm.more if arm.cache != arm.recipe else ()
        self._glue(self.work / f"built-{cache.name}", self._start(arm), 1, 1e-4, 32, *whole, *mapped, *built)

    @property
    def augmented(self) -> Path:
        """The originals and their copies."""
        return self.work / f"{self.task}-augmented.json"

    def score(self, name: str, seed: int) -> dict[str, Any]:
        """Train one arm; its score, in percent, and the seconds it took."""
        arm, folder = ARMS[name], self.work / f"{self.task}-{name}-{seed}"
        intermediate, prediction = self.options.epochs
        # As many steps, whatever the data.
        times = arm.times * (1.0 if arm.augmented else self._rows(self.augmented) / self._rows(self.work / f"{self.task}.json"))
        more: list[Any] = ["--train_file", self.augmented] if arm.augmented else []
        if arm.recipe is not None:
            taught = ("--teacher_model_name_or_path", self.teacher) if self.options.live else ("--teacher_cache_dir", self._cache(name))
            more += ["--trainer_class", "DistillTrainer", "--distill_recipe", arm.recipe, *arm.more, *taught]
            # Originals stand among the augmented texts, so one teacher on disk serves both.
            if arm.phases:
                more += ["--distill_phases", f"intermediate={times * intermediate:g},prediction={times * prediction:g}"]
        started = time.perf_counter()
        epochs = times * (intermediate + prediction)
        self._glue(folder, self._start(arm), epochs, self.options.learning_rate, 32, *more, "--seed", seed)
        return {"score": score_in(folder), "seconds": round(time.perf_counter() - started)}

    def _start(self, arm: Arm) -> Path:
        return self.work / ("general" if arm.start == "general" else f"{arm.start}-{self.task}")

    def _cache(self, name: str) -> Path:
        return self.work / f"cache-{self.task}-{ARMS[name].cache}"

    def _glue(self, output: Path, model: object, epochs: float, rate: float, batch: int, *more: object) -> None:
        fixed = ("--pad_to_max_length", "False", "--save_strategy", "no", "--per_device_train_batch_size", batch)
        asked = ("--model_name_or_path", model, "--num_train_epochs", f"{epochs:g}", "--learning_rate", rate, "--output_dir", output)
        task = ("--task_name", self.task, "--do_train", "--do_eval")
        if self.options.max_examples and "--train_file" not in more:
            more = (*more, "--max_train_samples", self.options.max_examples)
        self._run(output.name, "run", "glue", *task, *asked, *fixed, *self._hardware(), *more)

    def _hardware(self) -> tuple[str, ...]:
        return ("--report_to", "none", *shlex.split(self.options.training_flags))

    def _rows(self, file: Path) -> int:
        return len(load_dataset("json", data_files=str(file), split="train"))

    def _run(self, name: str, *words: object) -> None:
        command = [str(word) for word in words]
        log = self.work / "logs" / f"{name}.log"
        threads = {} if self.options.jobs == 1 else {"OMP_NUM_THREADS": "1"}
        with log.open("a", encoding="utf-8") as file:
            print("$ hf-compress", shlex.join(command), file=file, flush=True)
            whole = [sys.executable, "-m", "hf_compress.cli.app", *command]
            done = subprocess.run(whole, stdout=file, stderr=subprocess.STDOUT, env={**os.environ, **threads}, check=False)
        if done.returncode:
            said = "\n".join(log.read_text(encoding="utf-8", errors="replace").splitlines()[-12:])
            raise RuntimeError(f"{name} ended with exit code {done.returncode}:\n{said}")


def score_in(folder: Path) -> float:
    """What a run wrote into its folder, in percent."""
    result = json.loads((folder / "eval_results.json").read_text(encoding="utf-8"))
    return round(100 * next(result[metric] for metric in SCORES if metric in result), 2)


class Record:
    """The scores in a file, written anew at each one.

    Args:
        path: of the file.
        settings: what is kept beside each score.
    """

    def __init__(self, path: Path, settings: dict[str, Any]) -> None:
        self.path, self.settings, self._lock = path, settings, threading.Lock()
        self.results = self._read()

    def _read(self) -> dict[str, Any]:
        found: dict[str, Any] = json.loads(self.path.read_text(encoding="utf-8")) if self.path.exists() else {"tasks": {}}
        return found

    def of(self, task: str) -> dict[str, Any]:
        """What is known of a task."""
        found: dict[str, Any] = self.results["tasks"].setdefault(task, {"arms": {}})
        return found

    def add(self, task: str, name: str, seed: int, found: dict[str, Any]) -> None:
        """Write one score."""
        with self._lock:
            teacher = self.of(task).get("teacher")
            self.results = self._read()  # another command may have written meanwhile
            if teacher is not None:
                self.of(task)["teacher"] = teacher
            self.of(task)["arms"].setdefault(name, {})[str(seed)] = {**found, **self.settings, "machine": machine()}
            self.path.write_text(json.dumps(self.results, indent=1) + "\n", encoding="utf-8")
            print(f"{task} {name} {seed}: {found['score']:.1f} in {found['seconds']} s", flush=True)


def all_of(pool: ThreadPoolExecutor, work: Iterable[Callable[[], None]]) -> int:
    """Do it all, whatever fails among it; how much failed, once it was said."""
    failed = 0
    for future in [pool.submit(each) for each in work]:
        error = future.exception()
        if error is not None:
            failed += 1
            print(f"FAILED: {error}", file=sys.stderr, flush=True)
    return failed


def train(options: argparse.Namespace, record: Record) -> int:
    """Prepare, build the teachers on disk, and train every arm that has no score yet; how much failed."""
    ends = time.monotonic() + 60 * options.minutes
    arms = options.arms or list(ARMS)
    tasks = {task: Ablation(options, task) for task in options.tasks}
    wanted = [
        (task, name, seed)
        for seed in options.seeds
        for name in arms
        for task in tasks
        if str(seed) not in record.of(task)["arms"].get(name, {})
    ]

    def train_one(task: str, name: str, seed: int) -> None:
        if time.monotonic() < ends:
            record.add(task, name, seed, tasks[task].score(name, seed))

    with ThreadPoolExecutor(options.jobs) as pool:
        starts = {ARMS[name].start for _, name, _ in wanted}
        general = [each.prepare_general for each in list(tasks.values())[:1] if "general" in starts]
        models = [step for each in tasks.values() for step in (partial(each.prepare_models, starts), each.prepare_texts)]
        failed = all_of(pool, [*general, *models])
        if failed:
            return failed
        for task, each in tasks.items():
            record.of(task)["teacher"] = score_in(each.teacher)
        caches = {(task, ARMS[name].cache): partial(tasks[task].build, name) for task, name, _ in wanted if ARMS[name].recipe is not None}
        failed += all_of(pool, caches.values())
        return failed + all_of(pool, [partial(train_one, *one) for one in wanted])


def table(results: dict[str, Any]) -> str:
    """Markdown: a row an arm, tasks side by side, in the order of `ARMS`."""
    tasks = [task for task, found in results["tasks"].items() if "teacher" in found]
    lines = ["| arm | " + " | ".join(tasks) + " |", "|---|" + "---:|" * len(tasks)]
    lines.append("| the teacher | " + " | ".join(f"{results['tasks'][task]['teacher']:.1f}" for task in tasks) + " |")
    for name, arm in ARMS.items():
        cells = []
        for task in tasks:
            seeds = results["tasks"][task]["arms"].get(name, {})
            scores = [found["score"] for found in seeds.values()]
            each = f" ({', '.join(f'{score:.1f}' for score in scores)})" if len(scores) > 1 else ""
            cells.append(f"{statistics.fmean(scores):.1f}{each}" if scores else "")
        if any(cells):
            lines.append(f"| `{name}`: {arm.what} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> int:
    """Run the arms that are asked for, or print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    parser.add_argument("arms", nargs="*", metavar="ARM", help=f"{', '.join(ARMS)}; by default all, in this order")
    parser.add_argument("--json", required=True, metavar="FILE", help="where scores go, and stand already")
    parser.add_argument("--table", action="store_true", help="print what stands there, and train nothing")
    parser.add_argument("--tasks", nargs="+", default=["mrpc"], help="GLUE tasks")
    parser.add_argument("--model", metavar="FOLDER", help="the encoder that becomes the teacher")
    parser.add_argument("--text", metavar="FILE", help="raw text, a line a text")
    parser.add_argument("--vectors", metavar="FILE", help="word vectors")
    parser.add_argument("--mlm", metavar="MODEL", help="a masked LM for the augmentation; without it, vectors alone")
    parser.add_argument("--work", metavar="FOLDER", help="for models, texts and teachers on disk")
    parser.add_argument(
        "--max_examples", type=int, metavar="N", help="the first N of the task's training examples: for teacher and students"
    )
    parser.add_argument("--copies", type=int, default=2, help="N of the augmentation")
    parser.add_argument("--epochs", type=float, nargs=2, default=(3, 1), metavar=("LAYERS", "PREDICTIONS"), help="on the augmented texts")
    parser.add_argument("--learning_rate", type=float, default=2e-4)
    parser.add_argument("--general_epochs", type=float, default=3)
    parser.add_argument("--general_learning_rate", type=float, default=5e-4)
    parser.add_argument("--seeds", type=int, nargs="+", default=[42])
    parser.add_argument("--live", action="store_true", help="no teacher on disk: with attention scores each takes gigabytes")
    parser.add_argument("--jobs", type=int, default=1, help="commands at a time")
    parser.add_argument("--minutes", type=float, default=float("inf"), help="no arm begins later")
    parser.add_argument("--training_flags", default="", help='for every training, as in "--bf16 True --use_cpu True"')
    options = parser.parse_args()
    settings = {"epochs": list(options.epochs), "copies": options.copies, "learning_rate": options.learning_rate}
    if options.max_examples:
        settings["max_examples"] = options.max_examples
    record = Record(Path(options.json).resolve(), settings)
    if options.table:
        print(table(record.results))
        return 0
    if unknown := sorted(set(options.arms) - ARMS.keys()):
        parser.error(f"there is no arm {unknown[0]}; there are {', '.join(ARMS)}")
    for needed in ("model", "text", "vectors", "work"):
        if getattr(options, needed) is None:
            parser.error(f"--{needed} is needed to train")
    failed = train(options, record)
    print(table(record.results))
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
