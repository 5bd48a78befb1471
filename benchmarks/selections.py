"""Which tokens, which dimensions, which layers, which number format: the defaults of `--hsk`, measured on the demo's corpus.

The demo's teacher, and one teacher on disk that holds all of its layers in float32; each row is a view of it. Two students (one narrow,
from random weights; one of kept layers) learn from each, with every seed, and answer 2,000 test examples.

    .venv/bin/python benchmarks/selections.py --json benchmarks/results/selections.json
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import statistics
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from measuring import machine
from rich.console import Console
from transformers import AutoModelForSequenceClassification, TrainingArguments

from hf_compress import DistillTrainer, __version__
from hf_compress.arguments import CompressionArguments
from hf_compress.cache.codec_name import CODEC_NAMES, CodecName
from hf_compress.cache.copy_view import View, copy_view
from hf_compress.cache.reader import TeacherCache
from hf_compress.losses.hidden_states import HiddenStatesLoss
from hf_compress.losses.labels import LabelsLoss
from hf_compress.losses.logits import LogitsLoss
from hf_compress.losses.loss import Loss
from hf_compress.report.contenders import Transformer
from hf_compress.report.demo import STUDENTS, Corpus, new_student, new_teacher
from hf_compress.report.measure import accuracy
from hf_compress.report.settings import DemoSettings
from hf_compress.report.tokenizer import to_dataset
from hf_compress.report.training import ProgressBars, train

HIDDEN_STATES_WEIGHT = 10.0  # as in the recipe `layerwise`


@dataclass(frozen=True)
class Arm:
    """One way to choose; `flags` None is the logits alone."""

    part: str
    name: str
    flags: dict[str, str] | None
    codec: CodecName = "float32"


def arms() -> list[Arm]:
    """All of them, the ends first."""
    small = "1l_10t_0.1h"
    found = [Arm("ends", "logits only", None), Arm("ends", "everything", {"hidden_states_selection": "all"})]
    for scheme in ("own map", "t_top8", "t_top10", "t_top12"):
        layers = {} if scheme == "own map" else {"hsk_layers": scheme}
        found.append(Arm("depth, 1l", scheme, {"hidden_states_selection": "1l", **layers}))
        found.append(Arm(f"depth, {small}", scheme, {"hidden_states_selection": small, **layers}))
    for tokens in ("3t", "10t"):
        for scheme in ("left_first", "attention", "attention_no_sep"):
            found.append(Arm(f"length, {tokens}", scheme, {"hidden_states_selection": tokens, "hsk_length": scheme}))
    for share in ("0.1h", "0.25h"):
        for scheme in ("pca", "magnitude", "random", "uniform"):
            for mask in ("ignore", "zero_target"):
                flags = {"hidden_states_selection": share, "hsk_width": scheme, "hsk_mask": mask}
                found.append(Arm(f"width, {share}", f"{scheme}, {mask}", flags))
    for scheme in ("pca", "magnitude", "random", "uniform"):
        found.append(Arm(f"joint, {small}", scheme, {"hidden_states_selection": small, "hsk_width": scheme}))
    for codec in CODEC_NAMES[1:]:
        found.append(Arm("format, everything", codec, {"hidden_states_selection": "all"}, codec))
        found.append(Arm(f"format, {small}", codec, {"hidden_states_selection": small}, codec))
    return found


def build(corpus: Corpus, teacher: Path, folder: Path) -> None:
    """All layers of the teacher, whole: what a student of the same depth would compare."""
    flags = CompressionArguments(teacher_cache_dir=str(folder), teacher_cache_dtype="float32", build_teacher_cache_only=True)
    args = TrainingArguments(output_dir=str(folder / "run"), use_cpu=True, disable_tqdm=True, report_to="none")
    trainer = DistillTrainer(
        AutoModelForSequenceClassification.from_pretrained(teacher),  # its own layers, one by one: all are stored
        args,
        teacher=str(teacher),
        losses=[LogitsLoss(temperature=2.0), HiddenStatesLoss()],
        compression=flags,
        train_dataset=to_dataset(corpus.for_students, corpus.tokenizer),
        processing_class=corpus.tokenizer,
    )
    with contextlib.suppress(SystemExit):
        trainer.train()


def losses_of(arm: Arm, settings: DemoSettings) -> list[Loss]:
    """The default recipe without attention; without hidden states where there are none."""
    logits = LogitsLoss(temperature=settings.temperature)
    return [logits] if arm.flags is None else [logits, HiddenStatesLoss(weight=HIDDEN_STATES_WEIGHT)]


def folder_of(arm: Arm, whole: Path) -> Path:
    """The cache in the number format of the arm."""
    folder = whole if arm.codec == "float32" else whole.with_name(f"{whole.name}_{arm.codec}")
    if not folder.exists():
        copy_view(whole, folder, View(TeacherCache(whole).stored.selection, __version__, arm.codec))
    return folder


def measure(arm: Arm, student: str, seed: int, corpus: Corpus, settings: DemoSettings, teacher: Path, cache: Path, out: Path) -> float:
    """Train one student, and ask it about the test examples."""
    flags = CompressionArguments(teacher_cache_dir=str(cache), **(arm.flags or {}))
    with ProgressBars(Console(file=io.StringIO())) as bars:
        train(
            new_student(student, settings, teacher, seed),
            to_dataset(corpus.for_students, corpus.tokenizer),
            corpus.tokenizer,
            settings.student_schedule,
            losses=losses_of(arm, settings),
            output_dir=out,
            bars=bars,
            task=bars.add(arm.name, settings.student_schedule.steps),
            seed=seed,
            compression=flags,
        )
    return accuracy(Transformer.load(out), corpus.for_test)


def main(argv: Sequence[str] | None = None) -> int:
    """Measure all arms, arm by arm, and write what was found after each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--students", nargs="+", choices=STUDENTS, default=list(STUDENTS))
    parser.add_argument("--parts", nargs="+", help="only arms whose part begins with one of these")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args(argv)
    torch.set_num_threads(1)
    settings = DemoSettings()
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        corpus = Corpus.write(settings, 0)
        teacher, whole = root / "teacher", root / "cache"
        with ProgressBars(Console(file=sys.stderr)) as bars:
            train(
                new_teacher(settings, corpus.tokenizer, 0),
                to_dataset(corpus.for_teacher, corpus.tokenizer),
                corpus.tokenizer,
                settings.teacher_schedule,
                losses=[LabelsLoss()],
                output_dir=teacher,
                bars=bars,
                task=bars.add("teacher", settings.teacher_schedule.steps),
                seed=0,
            )
        build(corpus, teacher, whole)
        for arm in arms():
            if options.parts and not arm.part.startswith(tuple(options.parts)):
                continue
            cache = folder_of(arm, whole)
            scores = {
                student: [100 * measure(arm, student, seed, corpus, settings, teacher, cache, root / "student") for seed in options.seeds]
                for student in options.students
            }
            rows.append({"part": arm.part, "name": arm.name, "scores": scores})
            print(line_of(rows[-1]), flush=True)
            if options.json:
                found = {"machine": machine(), "seeds": options.seeds, "rows": rows}
                options.json.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
                options.json.with_suffix(".md").write_text(page_of(rows, options.seeds), encoding="utf-8")
    return 0


def page_of(rows: Sequence[dict[str, Any]], seeds: Sequence[int]) -> str:
    """What was found, in Markdown."""
    students = list(rows[0]["scores"])
    head = "".join(f" {student} | spread |" for student in students)
    lines = [
        "# Which part of the teacher: choices of `--hsk` on the demo's corpus",
        "",
        f"Accuracy of students that learn from views of one teacher on disk: means over the seeds {', '.join(map(str, seeds))}; spread is",
        "the largest minus the smallest. `benchmarks/selections.py` has every arm.",
        "",
        f"| part | how it is chosen |{head}",
        f"| --- | --- |{' ---: | ---: |' * len(students)}",
        *map(line_of, rows),
    ]
    return "\n".join(lines) + "\n"


def line_of(row: dict[str, Any]) -> str:
    """A row of the table, in Markdown: mean and spread (largest minus smallest) for each student."""
    numbers = [f"{statistics.mean(each):.1f} | {max(each) - min(each):.1f}" for each in row["scores"].values()]
    return " | ".join(["", row["part"], row["name"], *numbers, ""]).strip()


if __name__ == "__main__":
    sys.exit(main())
