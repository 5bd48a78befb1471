"""What building a teacher on disk costs beside the teacher's forward itself, on real sentences, which are of all lengths.

    a build / a bare forward: the same examples in batches of equal lengths, no hooks, nothing kept
    a build / a forward of every example padded to 128 tokens, as run_glue.py pads by default

A build is all of it: reading and planning, the price, choosing what is stored, writing, syncing, index and manifest.

    cd $GLUE && python benchmarks/cache_build.py --model $MODEL --json benchmarks/results/cache_build.json
    python benchmarks/cache_build.py --model $MODEL --data train.csv --examples 64 --rounds 1
"""

from __future__ import annotations

import argparse
import contextlib
import os
import shutil
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from measuring import Bar, Lane, finish, machine, median, take_turns
from speed import Work, trainer_settings
from torch import Tensor
from transformers import AutoModelForSequenceClassification, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from hf_compress import DistillTrainer, DistillTrainingArguments
from hf_compress.cache.build import CPU_BATCH_TOKENS
from hf_compress.scripts.run_glue import DataArguments, load_splits, tokenized

BUILD, BARE, PADDED = "build", "bare forward", "forward padded to 128"
LENGTH = 128


def sentences(tokenizer: PreTrainedTokenizerBase, file: str | None, task: str, limit: int | None) -> Any:
    """Training examples, tokenized and not padded: of a file, or of a GLUE task."""
    arguments = DataArguments(
        task_name=None if file else task, train_file=file, max_seq_length=LENGTH, pad_to_max_length=False, overwrite_cache=True
    )
    train = tokenized(load_splits(arguments, None), tokenizer, arguments, None)["train"]
    train = train if limit is None else train.select(range(min(limit, len(train))))
    return train.select_columns([name for name in train.column_names if name in (*tokenizer.model_input_names, "label")])


def building(
    student: PreTrainedModel, teacher: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, data: Any, selection: str | None
) -> Work:
    """A build in an empty folder, over and over."""
    chosen = {} if selection is None else {"hidden_states_selection": selection}

    def work(pause: Callable[[], None]) -> None:
        pause()
        while True:
            folder = Path(tempfile.mkdtemp(prefix="cache_"))
            settings = {**trainer_settings(32), **chosen, "teacher_cache_dir": str(folder), "build_teacher_cache_only": True}
            arguments = DistillTrainingArguments(**settings, distill_recipe="mud")
            with contextlib.suppress(SystemExit):
                DistillTrainer(model=student, args=arguments, train_dataset=data, teacher=teacher, processing_class=tokenizer).train()
            assert (folder / "manifest.json").exists()
            pause()
            shutil.rmtree(folder)

    return work


def forward(model: PreTrainedModel, batches: list[dict[str, Tensor]]) -> Work:
    """The model's own forward on all batches, without gradients."""

    def work(pause: Callable[[], None]) -> None:
        pause()
        while True:
            with torch.no_grad():
                for batch in batches:
                    model(**batch)
            pause()

    return work


def batches_of(tokenizer: PreTrainedTokenizerBase, data: Any, *, trimmed: bool) -> list[dict[str, Tensor]]:
    """Every example once; trimmed: the longest first, with as many tokens a batch as a build has, else 32 examples of 128 tokens."""
    rows = [{name: value for name, value in row.items() if name != "label"} for row in data]
    if not trimmed:
        parts = [rows[start : start + 32] for start in range(0, len(rows), 32)]
        return [dict(tokenizer.pad(part, padding="max_length", max_length=LENGTH, return_tensors="pt")) for part in parts]
    rows.sort(key=lambda row: -len(row["input_ids"]))
    batches = []
    while rows:
        count = max(1, CPU_BATCH_TOKENS // len(rows[0]["input_ids"]))
        batches.append(dict(tokenizer.pad(rows[:count], padding="longest", return_tensors="pt")))
        rows = rows[count:]
    return batches


def main() -> int:
    """Measure, print the table, and say which bar is missed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    parser.add_argument("--model", required=True, metavar="FOLDER", help="a sequence classifier, the teacher")
    parser.add_argument(
        "--data", metavar="FILE", help=".csv or .json; without it the GLUE task is loaded, from the folder one is in or the hub"
    )
    parser.add_argument("--task", default="mrpc", help="the GLUE task")
    parser.add_argument("--examples", type=int, help="only the first so many")
    parser.add_argument("--selection", default="1l_10t_0.1h", help="what is stored of hidden states; all for everything")
    parser.add_argument("--rounds", type=int, default=5, help="rounds that count")
    parser.add_argument("--warmup", type=int, default=1, help="rounds before them that do not")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--json", metavar="FILE")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    facts = {**machine(), "threads": options.threads}
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    data = sentences(tokenizer, options.data, options.task, options.examples)
    tokens = sum(map(len, data["input_ids"]))
    # One each, so that a builder's hooks are no other's; the first is the student, of whom a build asks nothing.
    models = [AutoModelForSequenceClassification.from_pretrained(options.model).eval() for _ in range(4)]
    works = {
        BUILD: building(models[0], models[1], tokenizer, data, None if options.selection == "all" else options.selection),
        BARE: forward(models[2], batches_of(tokenizer, data, trimmed=True)),
        PADDED: forward(models[3], batches_of(tokenizer, data, trimmed=False)),
    }
    lanes = [Lane(name, work) for name, work in works.items()]
    take_turns(lanes, options.rounds, options.warmup)
    for lane in lanes:
        lane.close()
    seconds = {lane.name: lane.seconds for lane in lanes}
    print(f"{len(data):,} examples, {tokens:,} tokens\n{'':<32} {'seconds':>8} {'tokens a second':>16}")
    for name, values in seconds.items():
        print(f"{name:<32} {median(values):>8.2f} {tokens / median(values):>16,.0f}")

    def ratio(below: str) -> float:
        return median([build / other for build, other in zip(seconds[BUILD], seconds[below], strict=True)])

    bars = [
        Bar("1 / (building, tokens a second / bare forward)", ratio(BARE), 1 / 0.9),
        Bar("1 / (building, tokens a second / forward padded to 128)", ratio(PADDED), 1 / 2),
    ]
    shapes = {"examples": len(data), "tokens": tokens, "selection": options.selection, "rounds": options.rounds}
    return finish(Path(__file__).stem, facts, bars, {"shapes": shapes, "seconds": seconds}, options.json)


if __name__ == "__main__":
    sys.exit(main())
