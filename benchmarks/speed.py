"""What distilling with a live teacher costs above what it cannot do without.

    ratio = a distilling step / (the teacher's forward without gradients + the student's own training step)

on BERT-base -> TinyBERT4 shapes (random weights from configs, classification head), batch 32, length 128, no padding: trimming gives
nothing here. The student's own step is one of transformers' Trainer, and the distilling step one of DistillTrainer, each with all that its
loop does between two steps. With `--textbrewer`, TextBrewer's hidden-state losses run beside the same losses of this package: same models,
data, layer pairs, optimizer.

    python benchmarks/speed.py --json benchmarks/results/speed.json
    python benchmarks/speed.py --rounds 3 --batch-size 4 --length 32 --vocabulary 1000      # a quick look
"""

from __future__ import annotations

import argparse
import copy
import os
import sys
import tempfile
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from measuring import CLOCKS, Bar, Lane, Work, finish, machine, median, quartiles, repeated, take_turns
from torch.utils.data import Dataset
from transformers import BertConfig, BertForSequenceClassification, PreTrainedModel, Trainer, TrainerCallback, TrainingArguments

from hf_compress import DistillTrainer, DistillTrainingArguments, EmbeddingsLoss, HiddenStatesLoss, LayerMap, LogitsLoss

LIMITS = {"logits": 1.05, "tinybert": 1.15}
STUDENT = {"num_hidden_layers": 4, "hidden_size": 312, "num_attention_heads": 12, "intermediate_size": 1200}
LAYER_MAP = LayerMap.uniform(4, 12)
TEACHER_FORWARD, STUDENT_STEP = "teacher's forward", "student's step alone"
OURS, TEXTBREWER = "hidden states (this package)", "hidden states (TextBrewer)"

KEEP_MEMORY = {"MALLOC_TRIM_THRESHOLD_": str(8 * 10**9), "MALLOC_MMAP_THRESHOLD_": str(8 * 10**9)}


class RandomSentences(Dataset[dict[str, Any]]):
    """Examples of one length, so many that no run comes to their end."""

    def __init__(self, vocabulary: int, length: int, size: int = 1 << 20) -> None:
        self._ids = torch.randint(0, vocabulary, (512, length), generator=torch.Generator().manual_seed(0))
        self._size = size

    def __len__(self) -> int:
        return self._size

    def __getitem__(self, index: int) -> dict[str, Any]:
        ids = self._ids[index % len(self._ids)]
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": index % 2}


class Pause(TrainerCallback):
    """Hands the turn on after each step of a Trainer."""

    def __init__(self, pause: Callable[[], None]) -> None:
        self._pause = pause

    def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
        """The set-up is over."""
        self._pause()

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        """Forward, backward, clipping, optimizer and schedule are done."""
        self._pause()


def trainer_settings(batch_size: int) -> dict[str, Any]:
    """The same for both Trainers: no logging, no saving, no end."""
    return {
        "output_dir": tempfile.mkdtemp(prefix="speed_"),
        "per_device_train_batch_size": batch_size,
        "max_steps": 10_000,
        "logging_steps": 10_000,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": True,
        "learning_rate": 1e-5,
    }


def plain_training(student: PreTrainedModel, data: RandomSentences, batch_size: int) -> Work:
    """Transformers' Trainer on the labels."""

    def work(pause: Callable[[], None]) -> None:
        arguments = TrainingArguments(**trainer_settings(batch_size))
        Trainer(model=student, args=arguments, train_dataset=data, callbacks=[Pause(pause)]).train()

    return work


def distilling(
    student: PreTrainedModel, teacher: BertForSequenceClassification, data: RandomSentences, batch_size: int, **settings: Any
) -> Work:
    """This package's DistillTrainer, with a recipe (`distill_recipe`) or a list of `losses`."""
    losses = settings.pop("losses", None)

    def work(pause: Callable[[], None]) -> None:
        arguments = DistillTrainingArguments(**trainer_settings(batch_size), **settings)
        DistillTrainer(model=student, args=arguments, train_dataset=data, teacher=teacher, losses=losses, callbacks=[Pause(pause)]).train()

    return work


def teacher_forward(teacher: BertForSequenceClassification, data: RandomSentences, batch_size: int) -> Work:
    """The teacher on a batch, without gradients, and nothing else asked of it."""
    rows = [data[index] for index in range(batch_size)]
    inputs = {name: torch.stack([row[name] for row in rows]) for name in ("input_ids", "attention_mask")}
    teacher.eval()

    @torch.no_grad()
    def forward() -> None:
        teacher(**inputs)

    return repeated(forward)


def textbrewer_distilling(
    student: BertForSequenceClassification,
    teacher: BertForSequenceClassification,
    data: RandomSentences,
    batch_size: int,
    folder: str | None,
) -> Work:
    """TextBrewer's GeneralDistiller: `hidden_mse` through a linear projection for each pair of layers, and its loss on the logits."""
    if folder:
        sys.path.insert(0, folder)
    # It imports a TensorBoard writer, which it uses only where a log_dir is given. The stand-in is gone before Trainer looks for one.
    writer = types.ModuleType("tensorboardX")
    writer.SummaryWriter = None  # type: ignore[attr-defined]
    sys.modules["tensorboardX"] = writer
    import textbrewer

    del sys.modules["tensorboardX"]

    widths = [student.config.hidden_size, teacher.config.hidden_size]
    projection = {"proj": ["linear", *widths]} if widths[0] != widths[1] else {}
    pairs = [(0, 0), *LAYER_MAP.pairs]
    matches = [{"layer_S": s, "layer_T": t, "feature": "hidden", "loss": "hidden_mse", "weight": 1, **projection} for s, t in pairs]

    def adaptor(batch: dict[str, torch.Tensor], outputs: Any) -> dict[str, Any]:
        return {"logits": outputs.logits, "hidden": outputs.hidden_states, "inputs_mask": batch["attention_mask"]}

    def collate(rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        return {name: torch.stack([row[name] for row in rows]) for name in ("input_ids", "attention_mask")}

    def work(pause: Callable[[], None]) -> None:
        def hand_on(batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
            pause()
            return batch

        distiller = textbrewer.GeneralDistiller(
            train_config=textbrewer.TrainingConfig(device="cpu", output_dir=tempfile.mkdtemp(prefix="speed_"), ckpt_steps=10_000),
            distill_config=textbrewer.DistillationConfig(temperature=2, intermediate_matches=matches),
            model_T=teacher,
            model_S=student,
            adaptor_T=adaptor,
            adaptor_S=adaptor,
        )
        loader = torch.utils.data.DataLoader(data, batch_size=batch_size, shuffle=True, collate_fn=collate)
        optimizer = torch.optim.AdamW(student.parameters(), lr=1e-5, fused=True)
        with distiller:
            distiller.train(
                optimizer,
                loader,
                num_steps=10_000,
                max_grad_norm=1.0,
                batch_postprocessor=hand_on,
                output_hidden_states=True,
            )

    return work


def lanes_of(options: argparse.Namespace) -> list[Lane]:
    """Every lane with its own models, so that no hook of one is felt by another; the teachers share their weights, to save memory."""
    torch.manual_seed(0)
    vocabulary = {"vocab_size": options.vocabulary, "max_position_embeddings": max(512, options.length)}
    teacher = BertForSequenceClassification(BertConfig(**vocabulary)).eval()
    student = BertForSequenceClassification(BertConfig(**vocabulary, **STUDENT))
    data = RandomSentences(options.vocabulary, options.length)
    size = options.batch_size

    def both() -> tuple[BertForSequenceClassification, BertForSequenceClassification]:
        return copy.deepcopy(student), copy.deepcopy(teacher, {id(weight): weight for weight in teacher.parameters()})

    works: dict[str, Work] = {
        TEACHER_FORWARD: teacher_forward(teacher, data, size),
        STUDENT_STEP: plain_training(copy.deepcopy(student), data, size),
    }
    for recipe in LIMITS:
        if recipe in options.recipes:
            works[recipe] = distilling(*both(), data, size, distill_recipe=recipe)
    if options.textbrewer is not None:
        losses = [LogitsLoss(), EmbeddingsLoss(projection="per_layer"), HiddenStatesLoss(LAYER_MAP, projection="per_layer")]
        works[OURS] = distilling(*both(), data, size, losses=losses)
        works[TEXTBREWER] = textbrewer_distilling(*both(), data, size, options.textbrewer)
    return [Lane(name, work, options.clock) for name, work in works.items()]


def main() -> int:
    """Measure, print the table, and say which bar is missed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    parser.add_argument("--rounds", type=int, default=9, help="rounds that count")
    parser.add_argument("--warmup", type=int, default=2, help="rounds before them that do not")
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--vocabulary", type=int, default=30522)
    parser.add_argument("--recipes", nargs="*", choices=LIMITS, default=list(LIMITS))
    parser.add_argument("--textbrewer", nargs="?", const="", metavar="FOLDER", help="compare with TextBrewer; FOLDER holds its package")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--clock", choices=CLOCKS, default="wall", help="cpu, with --threads 1, on a machine that is busy")
    parser.add_argument("--keep-memory", action="store_true", help="let glibc keep freed memory instead of giving it back to the system")
    parser.add_argument("--json", metavar="FILE")
    options = parser.parse_args()
    if options.keep_memory and not KEEP_MEMORY.items() <= os.environ.items():  # glibc reads them when a process starts
        os.execve(sys.executable, [sys.executable, *sys.argv], {**os.environ, **KEEP_MEMORY})
    torch.set_num_threads(options.threads)

    facts = {**machine(), "threads": options.threads, "clock": options.clock}
    lanes = lanes_of(options)
    take_turns(lanes, options.rounds, options.warmup)
    for lane in lanes:
        lane.close()

    seconds = {lane.name: lane.seconds for lane in lanes}
    alone = [sum(pair) for pair in zip(seconds[TEACHER_FORWARD], seconds[STUDENT_STEP], strict=True)]
    ratios = {
        name: [step / parts for step, parts in zip(values, alone, strict=True)]
        for name, values in seconds.items()
        if name not in (TEACHER_FORWARD, STUDENT_STEP)
    }
    print(f"{'':<32} {'seconds':>8}  {'ratio':>6}  middle half of {options.rounds} rounds")
    for name, values in seconds.items():
        within = "{:6.3f}  {:.3f} to {:.3f}".format(median(ratios[name]), *quartiles(ratios[name])) if name in ratios else ""
        print(f"{name:<32} {median(values):>8.3f}  {within}")

    bars = [Bar(f"step / parts alone, recipe {name}", median(ratios[name]), LIMITS[name]) for name in LIMITS if name in ratios]
    against = [ours / theirs for ours, theirs in zip(seconds[OURS], seconds[TEXTBREWER], strict=True)] if OURS in seconds else None
    bars.append(Bar("hidden-state losses: step / TextBrewer's step", against and median(against), 1.0))
    details = {
        "shapes": {"batch_size": options.batch_size, "length": options.length, "vocabulary": options.vocabulary, "rounds": options.rounds},
        "seconds": seconds,
        "ratios": {name: median(values) for name, values in ratios.items()},
    }
    return finish(Path(__file__).stem, facts, bars, details, options.json)


if __name__ == "__main__":
    sys.exit(main())
