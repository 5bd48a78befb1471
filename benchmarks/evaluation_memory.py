"""Does evaluation need more memory when the losses look at more hidden states? It should not.

    python benchmarks/evaluation_memory.py --json benchmarks/results/evaluation_memory.json

Each case evaluates in a process of its own and reports by how much memory rose above what it was before, at its peak. The last case is the
trap that a distilling Trainer can fall into, hidden states in the model's output, which Trainer gathers over the whole data set: it has
to show, or the measurement would see nothing. Linux with glibc only (/proc, malloc_trim).
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from measuring import Bar, finish, machine

MEGABYTE = 1 << 20
# Memory goes back to the system as soon as it is free, so that what a process holds is what it uses.
ALLOCATOR = {"MALLOC_ARENA_MAX": "1", "MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
NO_LOSS, ONE, ALL, TRAP = "no teacher (Trainer)", "hidden states of 1 layer", "hidden states of all layers", "trap: states in the output"
CASES = (NO_LOSS, ONE, ALL, TRAP)


def memory(field: str) -> int:
    """VmRSS, what this process holds now, or VmHWM, the most it ever held, in bytes."""
    for line in Path("/proc/self/status").read_text(encoding="utf-8").splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/self/status has no {field}")


def measure(case: str, options: argparse.Namespace) -> int:
    """Train a step, as in any run that evaluates between steps, evaluate two batches, then everything: the rise to the peak in bytes."""
    import torch
    from transformers import BertConfig, BertForSequenceClassification, Trainer, TrainingArguments

    from hf_compress import AttentionScoresLoss, DistillTrainer, EmbeddingsLoss, HiddenStatesLoss, LayerMap, LogitsLoss

    torch.manual_seed(0)
    torch.set_num_threads(options.threads)
    config = BertConfig(
        vocab_size=1000,
        num_hidden_layers=options.layers,
        hidden_size=options.hidden_size,
        num_attention_heads=4,
        intermediate_size=2 * options.hidden_size,
        output_hidden_states=case == TRAP,
    )
    student = BertForSequenceClassification(config)
    ids = torch.randint(0, 1000, (options.examples, options.length))
    rows = [{"input_ids": row, "attention_mask": torch.ones_like(row), "labels": number % 2} for number, row in enumerate(ids)]
    settings: dict[str, Any] = {
        "model": student,
        "args": TrainingArguments(
            tempfile.mkdtemp(prefix="memory_"),
            max_steps=1,
            save_strategy="no",
            per_device_eval_batch_size=16,
            report_to="none",
            disable_tqdm=True,
            use_cpu=True,
        ),
        "train_dataset": rows[:32],
        "eval_dataset": rows,
        "compute_metrics": lambda predictions: {},  # without it Trainer gathers nothing
    }
    if case in (ONE, ALL):
        every = tuple((layer, layer) for layer in range(1, options.layers + 1))
        layer_map = LayerMap(every if case == ALL else every[:1])
        losses = [LogitsLoss(), HiddenStatesLoss(layer_map)]
        if case == ALL:
            losses += [EmbeddingsLoss(), AttentionScoresLoss(layer_map)]
        trainer: Trainer = DistillTrainer(**settings, teacher=BertForSequenceClassification(config).eval(), losses=losses)
    else:
        trainer = Trainer(**settings)

    trainer.train()
    trainer.evaluate(rows[:32])
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)  # what training freed must not hide what evaluation takes
    Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")  # sets VmHWM back to what is held now
    before = memory("VmRSS")
    trainer.evaluate()
    return memory("VmHWM") - before


def main() -> int:
    """Measure each case in a process of its own, print the table, and say which bar is missed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    parser.add_argument("--examples", type=int, default=384)
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--hidden-size", type=int, default=128)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", metavar="FILE")
    parser.add_argument("--case", choices=CASES, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.case is not None:
        print(json.dumps(measure(options.case, options)))
        return 0

    facts = machine()
    rises: dict[str, float] = {}
    for case in CASES:
        command = [sys.executable, __file__, *sys.argv[1:], "--case", case]
        done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env={**os.environ, **ALLOCATOR})
        rises[case] = int(done.stdout.splitlines()[-1]) / MEGABYTE
        print(f"{case:<32} {rises[case]:>8.1f} MB above what was held before")
    one_layer = options.examples * options.length * options.hidden_size * 4 / MEGABYTE
    print(f"{'one layer of the whole data set':<32} {one_layer:>8.1f} MB")
    if rises[TRAP] - rises[NO_LOSS] < one_layer:
        raise RuntimeError("the trap did not show, so this measurement sees nothing: raise --examples")

    # Half a layer's states of the data set is far above the allocator's noise, and far below one layer kept by mistake.
    bars = [
        Bar("all layers - 1 layer, in hidden states of the data set", (rises[ALL] - rises[ONE]) / one_layer, 0.5),
        Bar("all layers - no teacher, in hidden states of the data set", (rises[ALL] - rises[NO_LOSS]) / one_layer, 0.5),
    ]
    shapes = {name: getattr(options, name) for name in ("examples", "length", "layers", "hidden_size")}
    return finish(Path(__file__).stem, facts, bars, {"megabytes": rises, "shapes": shapes}, options.json)


if __name__ == "__main__":
    sys.exit(main())
