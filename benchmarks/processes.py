"""Two processes on two cores, one thread each, joined by gloo under torchrun: what distilling adds there.

    a step     DistillTrainer / transformers' Trainer, both under DDP, the same student and batches:
                 labels             DistillTrainer on the labels alone, through its own counts, hooks and loss; nothing else to compute
                 logits from disk   the same with a cached teacher's logits: reading, and a loss of a few numbers
                 mud from disk      with parts of its last layer too; its losses and projections are work of their own, so it has no bar
    a build    of a teacher on disk by two processes / by one
    memory     the most a process ever held, training with a cached teacher (mud) / plain

The student has TinyBERT4's shape and the teacher BERT-base's, with random weights. A step's lanes take turns in the same two processes;
builds and memory are launches of their own.

    python benchmarks/processes.py --json benchmarks/results/processes.json
    python benchmarks/processes.py --parts step --rounds 3 --batch-size 4 --length 32 --vocabulary 1000 --clock cpu      # a quick look
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from evaluation_memory import ALLOCATOR, MEGABYTE, memory
from measuring import CLOCKS, Bar, Lane, finish, machine, median, quartiles, take_turns

PARTS = ("step", "build", "memory")
PLAIN, LABELS, LOGITS, MUD = "plain (Trainer)", "labels", "logits from disk", "mud from disk"
SELECTION = "1l_10t_0.1h"


def data_of(options: argparse.Namespace, *, uneven: bool) -> Any:
    """Random sentences, of one length, or of all lengths up to it."""
    import torch
    from datasets import Dataset

    generator = torch.Generator().manual_seed(0)
    rows = []
    for number in range(options.examples):
        length = int(torch.randint(8, options.length + 1, (1,), generator=generator)) if uneven else options.length
        ids = torch.randint(5, options.vocabulary, (length,), generator=generator).tolist()
        rows.append({"input_ids": ids, "attention_mask": [1] * length, "labels": number % 2})
    return Dataset.from_list(rows)


def padded(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """A batch, each example padded to the longest."""
    import torch
    from torch.nn.utils.rnn import pad_sequence

    columns = {name: [torch.tensor(row[name]) for row in rows] for name in rows[0]}
    return {
        name: torch.stack(values) if values[0].dim() == 0 else pad_sequence(values, batch_first=True) for name, values in columns.items()
    }


def models_of(options: argparse.Namespace) -> tuple[Any, Any]:
    """Student and teacher."""
    import torch
    from speed import STUDENT
    from transformers import BertConfig, BertForSequenceClassification

    torch.manual_seed(0)
    sizes = {"vocab_size": options.vocabulary, "max_position_embeddings": max(512, options.length)}
    teacher = BertForSequenceClassification(BertConfig(**sizes, **({"num_hidden_layers": 4} if options.small_teacher else {})))
    return BertForSequenceClassification(BertConfig(**sizes, **STUDENT)), teacher.eval()


def build(options: argparse.Namespace, folder: Path, data: Any, recipe: str) -> float:
    """Build a teacher on disk, on all processes of this launch; the seconds that this one took, once the models were there."""
    from speed import trainer_settings

    from hf_compress import DistillTrainer, DistillTrainingArguments

    student, teacher = models_of(options)
    selected = {"hidden_states_selection": SELECTION} if recipe == "mud" else {}
    settings = {**trainer_settings(32), "teacher_cache_dir": str(folder), "build_teacher_cache_only": True, "distill_recipe": recipe}
    arguments = DistillTrainingArguments(**settings, **selected)
    trainer = DistillTrainer(student, arguments, train_dataset=data, teacher=teacher, data_collator=padded)
    started = CLOCKS[options.clock]()
    with contextlib.suppress(SystemExit):
        trainer.train()
    return CLOCKS[options.clock]() - started


def work_step(options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """The lanes' seconds, as this process saw them."""
    from speed import Pause, plain_training, trainer_settings

    from hf_compress import DistillTrainer, DistillTrainingArguments, LabelsLoss

    data, size = data_of(options, uneven=False), options.batch_size
    for recipe in ("logits", "mud"):
        build(options, folder / recipe, data, recipe)

    def distilling(**settings: Any) -> Any:
        losses = settings.pop("losses", None)

        def work(pause: Any) -> None:
            arguments = DistillTrainingArguments(**trainer_settings(size), **settings)
            trainer = DistillTrainer(models_of(options)[0], arguments, losses=losses, train_dataset=data, callbacks=[Pause(pause)])
            trainer.train()

        return work

    works = {
        PLAIN: plain_training(models_of(options)[0], data, size),
        LABELS: distilling(losses=[LabelsLoss()]),
        LOGITS: distilling(distill_recipe="logits", teacher_cache_dir=str(folder / "logits")),
        MUD: distilling(teacher_cache_dir=str(folder / "mud")),
    }
    lanes = [Lane(name, work, options.clock) for name, work in works.items()]
    take_turns(lanes, options.rounds, options.warmup)
    return {lane.name: lane.seconds for lane in lanes}


def work_build(options: argparse.Namespace, folder: Path) -> float:
    """Seconds of a build of sentences of all lengths, by the slower process."""
    from hf_compress.agreement import from_all

    data = data_of(options, uneven=True)
    return max(from_all(build(options, folder / "built", data, "mud")))


def work_memory(options: argparse.Namespace, folder: Path) -> float:
    """The most that a process of this launch held, in MB; the cache is built by an earlier launch."""
    from speed import trainer_settings
    from transformers import Trainer, TrainingArguments

    from hf_compress import DistillTrainer, DistillTrainingArguments
    from hf_compress.agreement import from_all

    data = data_of(options, uneven=False)
    steps = {**trainer_settings(options.batch_size), "max_steps": 8}
    student = models_of(options)[0] if options.stage != "cache" else None
    if options.stage == "cache":
        build(options, folder / "mud", data, "mud")
    elif options.stage == "plain":
        Trainer(model=student, args=TrainingArguments(**steps), train_dataset=data).train()
    else:
        DistillTrainer(student, DistillTrainingArguments(**steps, teacher_cache_dir=str(folder / "mud")), train_dataset=data).train()
    most: int = max(from_all(memory("VmHWM")))
    return most / MEGABYTE


WORK = {"step": work_step, "build": work_build, "memory": work_memory}


def launched(part: str, processes: int, folder: Path, *more: str, environment: dict[str, str] | None = None) -> Any:
    """Start this file on so many processes, and read what the first of them found."""
    out = folder / "found.json"
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
    command = [sys.executable, *launcher, __file__, *sys.argv[1:], "--work", part, "--folder", str(folder), *more]
    subprocess.run(command, check=True, env={**os.environ, "OMP_NUM_THREADS": "1", **(environment or {})})
    return json.loads(out.read_text(encoding="utf-8"))


def of_work(options: argparse.Namespace) -> None:
    """What one process of a launch does."""
    import torch

    torch.set_num_threads(1)
    found = WORK[options.work](options, Path(options.folder))
    if int(os.environ["RANK"]) == 0:
        (Path(options.folder) / "found.json").write_text(json.dumps(found), encoding="utf-8")
    torch.distributed.barrier()
    sys.stdout.flush()
    os._exit(0)  # stopped lanes hold their reducers, which Python's shutdown would free in an order that gloo does not like


def main() -> int:
    """Measure, print the tables, and say which bar is missed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    parser.add_argument("--parts", nargs="*", choices=PARTS, default=list(PARTS))
    parser.add_argument("--rounds", type=int, default=9, help="rounds of steps that count; a third of them for builds")
    parser.add_argument("--warmup", type=int, default=3, help="rounds of steps before them that do not")
    parser.add_argument("--batch-size", type=int, default=16, help="of one process")
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--vocabulary", type=int, default=30522)
    parser.add_argument("--examples", type=int, default=512)
    parser.add_argument("--small-teacher", action="store_true", help="of 4 layers, for a quick look")
    parser.add_argument("--clock", choices=CLOCKS, default="wall", help="cpu on a machine that is busy: of a build, the slower process's")
    parser.add_argument("--json", metavar="FILE")
    parser.add_argument("--work", choices=PARTS, help=argparse.SUPPRESS)
    parser.add_argument("--folder", help=argparse.SUPPRESS)
    parser.add_argument("--stage", choices=("cache", "plain", "cached"), default="cache", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.work:
        of_work(options)
    facts = {**machine(), "threads": 1, "clock": options.clock}
    bars: list[Bar] = []
    details: dict[str, Any] = {
        "shapes": {name: getattr(options, name) for name in ("batch_size", "length", "vocabulary", "examples", "rounds", "small_teacher")}
    }
    for part in options.parts:
        started, root = time.perf_counter(), Path(tempfile.mkdtemp(prefix="processes_"))
        bars += {"step": step, "build": builds, "memory": peaks}[part](options, root, details)
        shutil.rmtree(root)
        print(f"{part}: {time.perf_counter() - started:.0f} seconds\n")
    return finish(Path(__file__).stem, facts, bars, details, options.json)


def step(options: argparse.Namespace, root: Path, details: dict[str, Any]) -> list[Bar]:
    """Two processes, four lanes."""
    seconds = details["step"] = launched("step", 2, root)
    ratios = {name: [own / plain for own, plain in zip(values, seconds[PLAIN], strict=True)] for name, values in seconds.items()}
    print(f"{'a step':<32} {'seconds':>8}  {'ratio':>6}  middle half of {options.rounds} rounds")
    for name, values in seconds.items():
        print(f"{name:<32} {median(values):>8.3f}  {median(ratios[name]):6.3f}  {'{:.3f} to {:.3f}'.format(*quartiles(ratios[name]))}")
    return [Bar(f"step of two processes, {name} / plain", median(ratios[name]), 1.03) for name in (LABELS, LOGITS)]


def builds(options: argparse.Namespace, root: Path, details: dict[str, Any]) -> list[Bar]:
    """By one process and by two, in turns."""
    seconds: dict[str, list[float]] = {"1": [], "2": []}
    for number in range(max(1, options.rounds // 3)):
        for count in ("12", "21")[number % 2]:
            (root / f"{number}-{count}").mkdir()
            seconds[count].append(launched("build", int(count), root / f"{number}-{count}"))
    details["build"] = seconds
    ratios = [two / one for one, two in zip(seconds["1"], seconds["2"], strict=True)]
    for count, values in seconds.items():
        print(f"a build by {count} {'process' if count == '1' else 'processes':<20} {median(values):>8.1f} seconds")
    print(f"{1 / median(ratios):.2f} times as fast")
    return [Bar("a build by two processes / by one", median(ratios), 1 / 1.7)]


def peaks(options: argparse.Namespace, root: Path, details: dict[str, Any]) -> list[Bar]:
    """The cache is built before; then a launch each."""
    launched("memory", 1, root, "--stage", "cache")
    megabytes = details["megabytes"] = {
        stage: launched("memory", 2, root, "--stage", stage, environment=ALLOCATOR) for stage in ("plain", "cached")
    }
    for name, value in megabytes.items():
        print(f"most memory of a process, {name:<12} {value:>8.1f} MB")
    return [Bar("most memory of a process, cached teacher / plain", megabytes["cached"] / megabytes["plain"], 1.05)]


if __name__ == "__main__":
    sys.exit(main())
