"""Training one model of the demo, with a progress bar in the place of the Trainer's log."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from datasets import Dataset
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn
from transformers import PreTrainedModel, PreTrainedTokenizerFast, PrinterCallback, ProgressCallback, TrainingArguments

from hf_compress.arguments import CompressionArguments
from hf_compress.losses.loss import Loss
from hf_compress.trainer import DistillTrainer


@dataclass(frozen=True)
class Schedule:
    """How long, how large, how fast: the learning rate rises over `warmup` of the steps, and falls to 0 over the others."""

    steps: int
    batch_size: int
    learning_rate: float
    warmup: float = 0.1


class ProgressBars:
    """One bar a model, all in one place; on a terminal they move, in a file each is written once, when it is full.

    Args:
        console: where they are drawn.
    """

    def __init__(self, console: Console) -> None:
        self.progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=None),
            MofNCompleteColumn(),
            TextColumn("steps"),
            TimeElapsedColumn(),
            console=console,
            expand=True,
        )

    def __enter__(self) -> ProgressBars:
        self.progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.progress.stop()

    def add(self, description: str, steps: int) -> TaskID:
        """A bar that waits for its turn."""
        return self.progress.add_task(description, total=steps, start=False)


class BarCallback(ProgressCallback):
    """Moves a bar in place of the Trainer's own, which writes a line for everything that is logged.

    Args:
        bars: where the bar is.
        task: which it is.
    """

    def __init__(self, bars: ProgressBars, task: TaskID) -> None:
        super().__init__()
        self.bars = bars
        self.task = task

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        """The time starts."""
        self.bars.progress.start_task(self.task)

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """One step more."""
        self.bars.progress.update(self.task, completed=state.global_step)

    def on_log(self, *_: Any, **__: Any) -> None:
        """Nothing is written."""

    def on_train_end(self, *_: Any, **__: Any) -> None:
        """The time stops."""
        self.bars.progress.stop_task(self.task)


def train(
    model: PreTrainedModel,
    dataset: Dataset,
    tokenizer: PreTrainedTokenizerFast,
    schedule: Schedule,
    *,
    losses: Sequence[Loss],
    output_dir: Path,
    bars: ProgressBars,
    task: TaskID,
    seed: int,
    teacher: Path | None = None,
    compression: CompressionArguments | None = None,
) -> float:
    """Train a model in place, save it with its tokenizer, and return the seconds that the training took.

    Args:
        model: with random weights, or a teacher's.
        dataset: tokenized.
        tokenizer: pads the batches, and is saved beside the model.
        schedule: see `Schedule`.
        losses: `[LabelsLoss()]` is plain training.
        output_dir: the model's folder.
        bars: where progress is shown.
        task: the bar of this model.
        seed: of the order of the data.
        teacher: folder of the model that the losses compare this one with, if they do.
        compression: where the teacher is to be stored, if it is.
    """
    args = TrainingArguments(
        output_dir=str(output_dir),
        max_steps=schedule.steps,
        per_device_train_batch_size=schedule.batch_size,
        learning_rate=schedule.learning_rate,
        warmup_steps=round(schedule.warmup * schedule.steps),
        weight_decay=0.01,
        seed=seed,
        use_cpu=True,
        disable_tqdm=True,
        report_to="none",
        logging_strategy="no",
        save_strategy="no",
    )
    trainer = DistillTrainer(
        model,
        args,
        teacher=None if teacher is None else str(teacher),
        losses=losses,
        compression=compression,
        train_dataset=dataset,
        processing_class=tokenizer,
        callbacks=[BarCallback(bars, task)],
    )
    trainer.remove_callback(PrinterCallback)
    started = time.perf_counter()
    trainer.train()
    seconds = time.perf_counter() - started
    trainer.save_model()
    return seconds
