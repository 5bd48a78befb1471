"""How small and how fast: parameters, megabytes and milliseconds of BERT-base and MiniLM shapes with layers dropped, and of TinyBERT4's.

Random weights from configs, since neither depends on what the weights are; layers are dropped by `drop_layers`, the narrow one is made by
`student_from_teacher`. The models take turns, so times compare within one run.

    python benchmarks/latency.py --json benchmarks/results/latency.json
"""

from __future__ import annotations

import argparse
import copy
import os
import sys
from pathlib import Path
from typing import Any

import torch
from measuring import Lane, Work, finish, machine, median, repeated, take_turns
from speed import STUDENT
from transformers import BertConfig, BertForSequenceClassification

from hf_compress import drop_layers, student_from_teacher

MINILM = {"num_hidden_layers": 6, "hidden_size": 384, "num_attention_heads": 12, "intermediate_size": 1536}


def models() -> dict[str, BertForSequenceClassification]:
    """By name, the whole ones first in their group."""
    found: dict[str, Any] = {}
    for name, config in (("BERT-base", BertConfig()), ("MiniLM", BertConfig(**MINILM))):
        whole = BertForSequenceClassification(config)
        found[f"{name}, {config.num_hidden_layers} layers"] = whole
        for dropped in (config.num_hidden_layers // 3, config.num_hidden_layers // 2):
            smaller = copy.deepcopy(whole)
            drop_layers(smaller, strategy="top", num_layers_to_drop=dropped)
            found[f"{name}, {config.num_hidden_layers - dropped} layers"] = smaller
        if name == "BERT-base":
            found["TinyBERT4's shape"] = student_from_teacher(whole, **STUDENT)
    return {name: model.eval() for name, model in found.items()}


def forward(model: BertForSequenceClassification, batch_size: int, length: int) -> Work:
    """One batch after another."""
    inputs = {"input_ids": torch.randint(1000, 2000, (batch_size, length)), "attention_mask": torch.ones(batch_size, length).long()}

    @torch.inference_mode()
    def step() -> None:
        model(**inputs)

    return repeated(step)


def main() -> int:
    """Measure, and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--length", type=int, default=64)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--json", metavar="FILE")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    facts = {**machine(), "threads": options.threads}
    torch.manual_seed(0)
    every = models()
    lanes = [Lane(name, forward(model, options.batch_size, options.length)) for name, model in every.items()]
    take_turns(lanes, options.rounds, warmup=2)
    for lane in lanes:
        lane.close()
    rows = {}
    whole = ""
    print("| model | parameters | MB | ms an example | times as fast |\n|---|---:|---:|---:|---:|")
    for lane in lanes:
        model = every[lane.name]
        whole = lane.name if lane.name.endswith(("12 layers", "MiniLM, 6 layers")) else whole
        full = next(each for each in lanes if each.name == whole)
        speedup = median([a / b for a, b in zip(full.seconds, lane.seconds, strict=True)])
        parameters = sum(weight.numel() for weight in model.parameters())
        milliseconds = 1000 * median(lane.seconds) / options.batch_size
        rows[lane.name] = {"parameters": parameters, "milliseconds": milliseconds, "times_as_fast": speedup}
        print(f"| {lane.name} | {parameters / 1e6:.1f}M | {4 * parameters / 1e6:.0f} | {milliseconds:.1f} | {speedup:.2f} |")
    details = {"shapes": {"batch_size": options.batch_size, "length": options.length, "rounds": options.rounds}, "rows": rows}
    return finish(Path(__file__).stem, facts, [], details, options.json)


if __name__ == "__main__":
    sys.exit(main())
