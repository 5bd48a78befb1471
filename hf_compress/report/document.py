"""What a demo found, and the files that say it: report.md for people, report.json for programs."""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import transformers

from hf_compress import __version__
from hf_compress.cache.selection import Selection
from hf_compress.report.corpus import LABELS, Example
from hf_compress.report.measure import BATCH_SIZE
from hf_compress.report.settings import DemoSettings
from hf_compress.report.table import Row, Training, json_rows, markdown_table


@dataclass(frozen=True)
class DemoReport:
    """What a demo found, and where it lies.

    Attributes:
        rows: of the table.
        settings: the sizes it ran with.
        seed: of weights and order.
        grammar_seed: of the corpus.
        threads: that torch computed with.
        seconds: that all of it took, by the clock.
        examples: some of the test set.
        models: by a name, the folder of each model, for `from_pretrained`.
        files: "report.md", "report.json" and "picture.png".
        scale: less than 1 was a shorter demo, which claims nothing.
    """

    rows: tuple[Row, ...]
    settings: DemoSettings
    seed: int
    grammar_seed: int
    threads: int
    seconds: float
    examples: tuple[Example, ...]
    models: dict[str, Path]
    files: dict[str, Path]
    scale: float = 1.0

    def row(self, name: str, training: Training = "labels") -> Row:
        """The row of that name and training."""
        return next(row for row in self.rows if (row.name, row.training) == (name, training))

    def gain(self, student: str) -> float:
        """What distilling adds to a student's accuracy, from -1 to 1."""
        return self.row(student, "distilled").accuracy - self.row(student, "labels").accuracy


def fairness(settings: DemoSettings) -> str:
    """How the comparison is made, in a sentence."""
    noise = f", {100 * settings.wrong_labels:g}% of them with the wrong label" if settings.wrong_labels else ""
    return (
        f"The teacher learnt from {settings.teacher_examples:,} labelled examples and so did the bag of words; all "
        f"trainings of students have the same {settings.student_examples:,} others{noise}, the same "
        f"{settings.student_schedule.steps:,} steps of {settings.student_schedule.batch_size} examples and the same single learning rate, "
        "and where a student is distilled, what the teacher shows on these examples (predictions, hidden states, attention) takes the "
        "place of their labels."
    )


def from_disk(stored: Row, live: Row) -> str:
    """What the student that learnt from disk shows, in a phrase."""
    return (
        f"{100 * stored.accuracy:.1f}% from {(stored.stored_bytes or 0) / 1e3:.0f} kB on disk, with no teacher loaded in training; "
        f"{100 * live.accuracy:.1f}% with the teacher beside it"
    )


def write_json(report: DemoReport) -> None:
    """Write report.json: the table's rows with all their digits, settings, seeds, machine."""
    content: dict[str, Any] = {
        "rows": json_rows(report.rows),
        "settings": asdict(report.settings),
        "seed": report.seed,
        "grammar_seed": report.grammar_seed,
        "scale": report.scale,
        "seconds": report.seconds,
        "comparison": fairness(report.settings),
        "machine": machine(report.threads),
        "models": {name: folder.name for name, folder in report.models.items()},
    }
    report.files["report.json"].write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def machine(threads: int) -> dict[str, Any]:
    """What it ran on."""
    return {
        "processor": platform.machine(),
        "cores": os.cpu_count(),
        "threads": threads,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "hf_compress": __version__,
    }


def write_markdown(report: DemoReport, students: Sequence[str], stored: str) -> None:
    """Write report.md: the question, the table, the picture, how it was measured, and how to load the models.

    Args:
        report: what was found.
        students: that learnt from labels only and distilled.
        stored: the one of them that learnt from disk as well.
    """
    settings, first = report.settings, next(iter(report.models.values()))
    gains = "; ".join(f"the {student} {100 * report.gain(student):+.1f} points" for student in students)
    lines = [
        "# hf-compress demo"
        if report.scale == 1
        else f"# hf-compress demo at scale {report.scale:g}, which is too short to claim anything",
        "",
        f"Distilling changed {gains}. {fairness(settings)}",
        "",
        f"The {stored}: {from_disk(report.row(stored, 'from disk'), report.row(stored, 'distilled'))}. Stored were the predictions, and "
        f"of the hidden states {Selection.parse(settings.stored).describe()}. Its seconds include storing.",
        "",
        markdown_table(report.rows),
        "",
        f"![accuracy against size]({report.files['picture.png'].name})",
        "",
        f"Accuracy is on {settings.test_examples:,} further examples with right labels. Megabytes (10^6 bytes) are the parameters in "
        f"memory. Time is from text to label in batches of {BATCH_SIZE}, threads: {report.threads}; "
        "the median over rounds in which all take turns.",
        "",
        "## The task",
        "",
        "One guest writes about a hotel, another replies: is the second one content? Negations and how far they reach, contrasts, and the "
        "reply decide; no word does alone.",
        "",
        *(f"- {example.review} | {example.reply} *{LABELS[example.label]}*" for example in report.examples),
        "",
        "## The models",
        "",
        *(f"- `{folder.name}`: {name}" for name, folder in report.models.items()),
        "",
        "```python",
        "from transformers import pipeline",
        "",
        f'classify = pipeline("text-classification", "{first.as_posix()}")',
        f'classify({{"text": "{report.examples[0].review}", "text_pair": "{report.examples[0].reply}"}})',
        "```",
        "",
        f"Seed {report.seed}, grammar seed {report.grammar_seed}, {report.seconds:.0f} seconds in all. "
        + ", ".join(f"{name} {value}" for name, value in machine(report.threads).items())
        + ".",
        "",
    ]
    report.files["report.md"].write_text("\n".join(lines), encoding="utf-8")
