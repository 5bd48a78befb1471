"""What a teacher on disk costs: a training step, a byte, a build, a look-up.

BERT-base -> TinyBERT4 shapes, or ROSITA6's (random weights from configs, classification head), batch 32, length 128, no padding. Every
part is the real thing: a cache is built by `DistillTrainer`, and each step is one of its `train()`, stopped between two steps; see
`measuring.py`.

    python benchmarks/cache.py --json benchmarks/results/cache.json
    python benchmarks/cache.py --student ROSITA6 --json benchmarks/results/cache_rosita6.json
    python benchmarks/cache.py --rounds 2 --warmup 1 --batch-size 4 --length 32 --vocabulary 1000 --sentences 64 --keys 100000
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import os
import resource
import sys
import tempfile
import time
from itertools import product
from pathlib import Path
from typing import Any

import torch
from cache_files import index_bars, read_bar, size_bars
from measuring import Bar, Lane, finish, machine, median, take_turns
from shapes import NAMES, small_student
from speed import Pause, RandomSentences, Work, distilling, plain_training, teacher_forward, trainer_settings
from transformers import BertConfig, BertForSequenceClassification, PreTrainedModel

from hf_compress import CachedTeacher, DistillTrainer, DistillTrainingArguments
from hf_compress.cache.reader import TeacherCache
from hf_compress.signals import Signals

SMALL, FULL = "1l_10t_0.1h", "all"
LIVE, ALONE, FORWARD = "live", "student's step alone", "teacher's forward"
# How much faster training from disk is than with a teacher, in 2106.05691.
FASTER = {"TinyBERT4": 3.4, "ROSITA6": 2.7}


class FewSentences(RandomSentences):
    """So many different examples, over and over."""

    def __init__(self, vocabulary: int, length: int, different: int) -> None:
        super().__init__(vocabulary, length)
        self._ids = self._ids[:different] if different <= len(self._ids) else self._ids


class InMemory:
    """Stands where a cache stands, and gives the same tensors each time, without reading anything."""

    def __init__(self, cache: TeacherCache, signals: Signals) -> None:
        self._signals = signals
        self.manifest = cache.manifest

    def read(self, *_: Any, **__: Any) -> Signals:
        """Nothing is read."""
        return self._signals

    def missing(self, _: Any) -> int:
        """It knows every example."""
        return 0

    def reader(self) -> InMemory:
        """It may be read by several threads."""
        return self

    def close(self) -> None:
        """Nothing is open."""


def settings_of(selection: str, folder: Path) -> dict[str, Any]:
    """The flags of one cache."""
    chosen = {} if selection == FULL else {"hidden_states_selection": selection}
    return {"distill_recipe": "mud", "teacher_cache_dir": str(folder), **chosen}


def build(teacher: PreTrainedModel, student: PreTrainedModel, data: Any, size: int, selection: str, folder: Path) -> float:
    """Build a cache; seconds."""
    arguments = DistillTrainingArguments(
        **trainer_settings(size), **settings_of(selection, folder), teacher_cache_dtype="float16", build_teacher_cache_only=True
    )
    started = time.perf_counter()
    with contextlib.suppress(SystemExit):
        DistillTrainer(model=student, args=arguments, train_dataset=data, teacher=teacher).train()
    return time.perf_counter() - started


def from_disk(student: PreTrainedModel, data: Any, size: int, workers: int, *, in_memory: bool, **flags: Any) -> Work:
    """Training from a cache; with `in_memory`, the same step with its tensors at hand."""

    def work(pause: Any) -> None:
        arguments = DistillTrainingArguments(**trainer_settings(size), **flags, dataloader_num_workers=workers)
        trainer = DistillTrainer(model=student, args=arguments, train_dataset=data, callbacks=[Pause(pause)])
        if in_memory:
            hold(trainer, data, size)
        trainer.train()

    return work


def hold(trainer: DistillTrainer, data: Any, size: int) -> None:
    """Let the tensors of one batch stand for those of every batch."""
    assert trainer.distillation is not None and isinstance(trainer.distillation.teacher, CachedTeacher)
    distillation, teacher = trainer.distillation, trainer.distillation.teacher
    batch = trainer.data_collator([data[index] for index in range(size)])
    signals = teacher.signals(batch, distillation.whole_teacher_spec)
    teacher.cache = InMemory(teacher.cache, signals)  # type: ignore[assignment]


def main() -> int:
    """Measure, print the table, and say which bar is missed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    parser.add_argument("--student", choices=NAMES, default="TinyBERT4", help="ROSITA6: the paper's ratio alone")
    parser.add_argument("--rounds", type=int, default=9, help="rounds that count")
    parser.add_argument("--warmup", type=int, default=2, help="rounds before them that do not")
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--vocabulary", type=int, default=30522)
    parser.add_argument("--sentences", type=int, default=320, help="different examples: what the caches hold")
    parser.add_argument("--keys", type=int, default=10_000_000, help="made-up keys of the large index")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--json", metavar="FILE")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    facts = {**machine(), "threads": options.threads}
    torch.manual_seed(0)
    vocabulary = {"vocab_size": options.vocabulary, "max_position_embeddings": max(512, options.length)}
    teacher = BertForSequenceClassification(BertConfig(**vocabulary)).eval()
    student = small_student(options.student, vocabulary)
    data, size = FewSentences(options.vocabulary, options.length, options.sentences), options.batch_size
    building = torch.utils.data.Subset(data, range(options.sentences))
    root = Path(tempfile.mkdtemp(prefix="cache_"))

    # All lanes of the pruned student do not fit into 24 GB at once: of it the one is measured that the paper's ratio is about.
    whole = options.student == NAMES[0]
    stored = list(product((SMALL, FULL), (0, 2), (False, True))) if whole else [(SMALL, 0, False)]
    built = dict.fromkeys(name for name, _, _ in stored)

    seconds_of_build = {name: build(teacher, copy.deepcopy(student), building, size, name, root / name) for name in built}
    print("built in " + ", ".join(f"{name}: {value:.0f} s" for name, value in seconds_of_build.items()), file=sys.stderr)

    works: dict[str, Work] = {
        FORWARD: teacher_forward(teacher, data, size),
        ALONE: plain_training(copy.deepcopy(student), data, size),
        LIVE: distilling(
            copy.deepcopy(student), teacher, data, size, distill_recipe="mud", distill_layer_map=f"{student.config.num_hidden_layers}:12"
        ),
    }
    for name, workers, in_memory in stored:
        lane = f"{name}, {workers} workers" + (", in memory" if in_memory else "")
        works[lane] = from_disk(copy.deepcopy(student), data, size, workers, in_memory=in_memory, **settings_of(name, root / name))
    lanes = [Lane(name, work) for name, work in works.items()]
    take_turns(lanes, options.rounds, options.warmup)
    for lane in lanes:
        lane.close()
    seconds = {lane.name: lane.seconds for lane in lanes}

    def ratio(above: str, below: str) -> float:
        return median([a / b for a, b in zip(seconds[above], seconds[below], strict=True)])

    print(f"{'':<40} {'seconds':>8}")
    for name, values in seconds.items():
        print(f"{name:<40} {median(values):>8.3f}")
    cached = f"{SMALL}, 0 workers"
    parts = median([(f + s) / s for f, s in zip(seconds[FORWARD], seconds[ALONE], strict=True)])
    live = median([x / (f + s) for x, f, s in zip(seconds[LIVE], seconds[FORWARD], seconds[ALONE], strict=True)])
    bars = [
        Bar("live step / (teacher's forward + student's step)", live, 1.05),
        Bar("1 / (live step / cached step), 1l_10t_0.1h", 1 / ratio(LIVE, cached), 1 / FASTER[options.student]),
        Bar("(parts alone / student's step) / (live step / cached step)", parts / ratio(LIVE, cached), 1 / 0.95),
    ]
    for name, workers, in_memory in stored:
        if in_memory:
            lane = f"{name}, {workers} workers"
            bars.append(Bar(f"cached step / in memory, {lane}", ratio(lane, f"{lane}, in memory"), {SMALL: 1.03, FULL: 1.10}[name]))
    if whole:
        bars += [*size_bars(), *index_bars(options.keys), read_bar(root / FULL, size)]
    details = {
        "student": options.student,
        "shapes": {"batch_size": size, "length": options.length, "sentences": options.sentences, "rounds": options.rounds},
        "seconds": seconds,
        "seconds_of_build": seconds_of_build,
        "peak_megabytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
    }
    return finish(Path(__file__).stem, facts, bars, details, options.json)


if __name__ == "__main__":
    sys.exit(main())
