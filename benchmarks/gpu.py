"""Steps a second on a GPU: a student alone, with a live teacher, and from disk; how busy the GPU is meanwhile.

    teacher   BERT-base's shape             students   TinyBERT4's (4 layers, 312 wide), ROSITA6's (6 layers, 2 heads of 64, 768 neurons)
    plain     transformers' Trainer         live, disk   DistillTrainer, recipe mud

Random weights from configs, sentences of one length. Each part is the real loop, stopped after --steps steps, once the GPU has caught up;
the parts take turns, see `measuring.py`. On a machine without a GPU it runs on the CPU, small.

    python benchmarks/gpu.py --bf16 --json benchmarks/results/gpu.json
    python benchmarks/gpu.py --rounds 2 --steps 2 --batch-size 4 --length 16 --vocabulary 1000 --sentences 32 --layers 4     # a quick look
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from cache import FewSentences
from measuring import Bar, Lane, finish, machine, median, take_turns
from shapes import NAMES, small_student
from speed import Work
from transformers import BertConfig, BertForSequenceClassification, PreTrainedModel, Trainer, TrainerCallback, TrainingArguments

from hf_compress import DistillTrainer, DistillTrainingArguments, TeacherCache

SELECTIONS = {"1l_10t_0.1h": {"hidden_states_selection": "1l_10t_0.1h"}, "all": {}}
FORWARD = "teacher's forward"
ON_GPU = torch.cuda.is_available()


def wait() -> None:
    """Until the GPU has done what it was given."""
    if ON_GPU:
        torch.cuda.synchronize()


class EverySteps(TrainerCallback):
    """Hands the turn on after every so many steps of a Trainer."""

    def __init__(self, pause: Callable[[], None], steps: int) -> None:
        self._pause, self._steps = pause, steps

    def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
        """The set-up is over."""
        self._pause()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """So many steps are done."""
        if state.global_step % self._steps == 0:
            wait()
            self._pause()


class Watched(Lane):
    """A lane that notes how busy the GPU was while it ran, in percent, and how much memory its steps took beyond what was there."""

    def __init__(self, name: str, work: Work) -> None:
        self.busy: list[float] = []
        self.megabytes: list[float] = []
        super().__init__(name, work)

    def step(self) -> None:
        """Do so many steps."""
        if not ON_GPU:
            super().step()
            return
        wait()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        with watching() as seen:
            super().step()
        self.busy += seen
        self.megabytes.append((torch.cuda.max_memory_allocated() - before) / 1e6)


@contextlib.contextmanager
def watching(every: float = 0.02) -> Iterator[list[float]]:
    """What the GPU says of itself, asked in a thread."""
    seen: list[float] = []
    over = threading.Event()

    def ask() -> None:
        while not over.wait(every):
            seen.append(float(torch.cuda.utilization()))

    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    try:
        yield seen
    finally:
        over.set()
        thread.join()


def settings(options: argparse.Namespace) -> dict[str, Any]:
    """The same for both Trainers: no logging, no saving, no end."""
    return {
        "output_dir": tempfile.mkdtemp(prefix="gpu_"),
        "per_device_train_batch_size": options.batch_size,
        "max_steps": 1_000_000,
        "logging_steps": 1_000_000,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": not ON_GPU,
        "bf16": options.bf16,
        "learning_rate": 1e-5,
        "dataloader_num_workers": options.workers,
    }


def plain(student: PreTrainedModel, data: Any, options: argparse.Namespace) -> Work:
    """Transformers' Trainer on the labels."""

    def work(pause: Callable[[], None]) -> None:
        callbacks = [EverySteps(pause, options.steps)]
        Trainer(model=student, args=TrainingArguments(**settings(options)), train_dataset=data, callbacks=callbacks).train()

    return work


def distilling(student: PreTrainedModel, teacher: PreTrainedModel | None, data: Any, options: argparse.Namespace, **flags: Any) -> Work:
    """DistillTrainer with recipe mud."""

    def work(pause: Callable[[], None]) -> None:
        arguments = DistillTrainingArguments(**settings(options), distill_recipe="mud", **flags)
        callbacks = [EverySteps(pause, options.steps)]
        DistillTrainer(model=student, args=arguments, train_dataset=data, teacher=teacher, callbacks=callbacks).train()

    return work


def forwards(teacher: PreTrainedModel, data: Any, options: argparse.Namespace) -> Work:
    """The teacher on a batch, without gradients, and nothing else asked of it."""
    rows = [data[index] for index in range(options.batch_size)]
    inputs = {name: torch.stack([row[name] for row in rows]).to(teacher.device) for name in ("input_ids", "attention_mask")}

    @torch.no_grad()
    def forward() -> None:
        with torch.autocast(teacher.device.type, torch.bfloat16, enabled=options.bf16):
            for _ in range(options.steps):
                teacher(**inputs)
        wait()

    def work(pause: Callable[[], None]) -> None:
        while True:
            pause()
            forward()

    return work


def build(student: PreTrainedModel, teacher: PreTrainedModel, data: Any, options: argparse.Namespace, folder: Path, flags: Any) -> float:
    """Build a teacher on disk; tokens that it holds a second, set-up and disk included."""
    arguments = DistillTrainingArguments(
        **{**settings(options), "per_device_train_batch_size": 128},
        distill_recipe="mud",
        teacher_cache_dir=str(folder),
        build_teacher_cache_only=True,
        **flags,
    )
    started = time.perf_counter()
    with contextlib.suppress(SystemExit):
        DistillTrainer(model=student, args=arguments, train_dataset=data, teacher=teacher).train()
    return len(TeacherCache(folder)) * options.length / (time.perf_counter() - started)


def main() -> int:
    """Measure, print the table, and say which bar is missed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    parser.add_argument("--rounds", type=int, default=7, help="rounds that count")
    parser.add_argument("--warmup", type=int, default=2, help="rounds before them that do not")
    parser.add_argument("--steps", type=int, default=25, help="training steps a turn")
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--vocabulary", type=int, default=30522)
    parser.add_argument("--students", nargs="+", default=list(NAMES), choices=NAMES)
    parser.add_argument("--layers", type=int, default=12, help="of the teacher")
    parser.add_argument("--sentences", type=int, default=512, help="different examples, 512 at most: what the teachers on disk hold")
    parser.add_argument("--workers", type=int, default=2, help="of the data loader")
    parser.add_argument("--bf16", action="store_true")
    parser.add_argument("--json", metavar="FILE")
    options = parser.parse_args()
    facts = machine()
    torch.manual_seed(0)
    words = {"vocab_size": options.vocabulary, "max_position_embeddings": max(512, options.length)}
    teacher = BertForSequenceClassification(BertConfig(**words, num_hidden_layers=options.layers)).eval()
    teacher = teacher.to("cuda" if ON_GPU else "cpu")
    students = {name: small_student(name, words) for name in options.students}
    data = FewSentences(options.vocabulary, options.length, options.sentences)
    building = torch.utils.data.Subset(data, range(options.sentences))
    root = Path(tempfile.mkdtemp(prefix="gpu_"))

    works: dict[str, Work] = {FORWARD: forwards(teacher, data, options)}
    built: dict[str, float] = {}
    for name, student in students.items():
        works[f"{name}: alone"] = plain(copy.deepcopy(student), data, options)
        last = student.config.num_hidden_layers
        works[f"{name}: live"] = distilling(
            copy.deepcopy(student), copy.deepcopy(teacher), data, options, distill_layer_map=f"{last}:{options.layers}"
        )
        for selection, flags in SELECTIONS.items():
            folder = root / name / selection
            built[f"{name}: {selection}"] = build(copy.deepcopy(student), copy.deepcopy(teacher), building, options, folder, flags)
            works[f"{name}: disk, {selection}"] = distilling(
                copy.deepcopy(student), None, data, options, teacher_cache_dir=str(folder), **flags
            )
    lanes = [Watched(name, work) for name, work in works.items()]
    take_turns(lanes, options.rounds, options.warmup)
    for lane in lanes:
        lane.close()

    seconds = {lane.name: [value / options.steps for value in lane.seconds] for lane in lanes}
    print(f"{'':<32} {'ms a step':>9} {'steps/s':>8} {'busy':>6} {'MB':>7}")
    rows = {}
    for lane in lanes:
        each = median(seconds[lane.name])
        busy = statistics.fmean(lane.busy) if lane.busy else None
        most = max(lane.megabytes, default=None)
        rows[lane.name] = {"steps_per_second": 1 / each, "busy_percent": busy, "peak_megabytes_of_a_step": most}
        cells = [f"{busy:>5.0f}%" if busy is not None else f"{'':>6}", f"{most:>7.0f}" if most is not None else ""]
        print(f"{lane.name:<32} {1000 * each:>9.2f} {1 / each:>8.1f} {cells[0]} {cells[1]}")
    for name, rate in built.items():
        print(f"built {name:<26} {rate:>9,.0f} tokens/s")

    def ratio(above: str, below: str) -> float:
        return median([a / b for a, b in zip(seconds[above], seconds[below], strict=True)])

    bars = []
    for name in students:
        parts = [f + s for f, s in zip(seconds[FORWARD], seconds[f"{name}: alone"], strict=True)]
        live = median([x / p for x, p in zip(seconds[f"{name}: live"], parts, strict=True)])
        bars.append(Bar(f"{name}: live step / (teacher's forward + step alone)", live, 1.05))
        bars += [Bar(f"{name}: step from disk, {s} / step alone", ratio(f"{name}: disk, {s}", f"{name}: alone"), 1.1) for s in SELECTIONS]
        bars.append(Bar(f"{name}: step from disk / live step", ratio(f"{name}: disk, 1l_10t_0.1h", f"{name}: live"), 1.0))
    shapes = {
        name: getattr(options, name) for name in ("batch_size", "length", "vocabulary", "layers", "sentences", "workers", "steps", "bf16")
    }
    return finish(
        Path(__file__).stem, facts, bars, {"shapes": shapes, "rows": rows, "tokens_a_second_built": built, "seconds": seconds}, options.json
    )


if __name__ == "__main__":
    sys.exit(main())
