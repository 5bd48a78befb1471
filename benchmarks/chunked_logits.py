"""What comparing a language model's predictions some tokens at a time saves in memory, and what it costs in time.

    python benchmarks/chunked_logits.py --json benchmarks/results/chunked_logits.json
    python benchmarks/chunked_logits.py --device cuda --vocabulary 128256 --batch-size 8 --length 1024 --student 1024x16 --teacher 2048x16

Llama-shaped models with random weights; a step is the teacher's forward, the student's forward and backward, for the losses on logits
(KL, T = 2) and labels. Each case runs in a process of its own and reports by how much memory rose at its peak above what it held before
(weights, their gradients and the batch), and the median time of a step. The cases:

    whole logits      --distill_logits_chunk_size 0
    labels alone      no teacher: what fine-tuning takes
    in chunks         as by default, and with other sizes of chunks
    top 64            in chunks, from a teacher's 64 largest logits, as from disk: there is no teacher
    layers, whole     hidden states alone, as in an intermediate phase, with --distill_logits_chunk_size 0: logits that nobody reads
    layers            the same by default

On CPU: Linux with glibc only (/proc, malloc_trim).
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from measuring import Bar, finish, machine

MEGABYTE = 1 << 20
# Memory goes back to the system as soon as it is free, so that what a process holds is what it uses.
ALLOCATOR = {"MALLOC_ARENA_MAX": "1", "MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
LABELS, WHOLE, CHUNKS, TOP, LAYERS = "labels alone", "whole logits", "in chunks", "top 64", "layers"
K = 64


def memory(field: str) -> int:
    """VmRSS, what this process holds now, or VmHWM, the most it ever held, in bytes."""
    for line in Path("/proc/self/status").read_text(encoding="utf-8").splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/self/status has no {field}")


def cases(options: argparse.Namespace) -> dict[str, tuple[str, int | None]]:
    """By name: the kind, and tokens a chunk; None is the default."""
    sizes = {f"{CHUNKS} of {size}": (CHUNKS, size) for size in options.chunk_sizes}
    return {
        WHOLE: (WHOLE, 0),
        LABELS: (LABELS, 0),
        CHUNKS: (CHUNKS, None),
        **sizes,
        TOP: (TOP, None),
        f"{LAYERS}, whole": (LAYERS, 0),
        LAYERS: (LAYERS, None),
    }


def measure(kind: str, chunk_size: int | None, options: argparse.Namespace) -> dict[str, float]:
    """Bytes at the peak above what was held, and seconds a step."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from hf_compress import HiddenStatesLoss, LabelsLoss, LiveTeacher, LogitsLoss
    from hf_compress.chunked_logits import ChunkSettings
    from hf_compress.distillation import Distillation
    from hf_compress.signals import Signals
    from hf_compress.task import ModelShape
    from hf_compress.top_logits import TopLogits

    torch.manual_seed(0)
    torch.set_num_threads(options.threads)
    device = torch.device(options.device)

    def model(shape: str) -> LlamaForCausalLM:
        width, layers = map(int, shape.split("x"))
        heads = max(1, width // 64)
        config = LlamaConfig(
            vocab_size=options.vocabulary,
            hidden_size=width,
            intermediate_size=3 * width,
            num_hidden_layers=layers,
            num_attention_heads=heads,
            num_key_value_heads=heads,
            tie_word_embeddings=True,
        )
        return LlamaForCausalLM(config).to(device)

    student = model(options.student).train()
    teacher = LiveTeacher(model(options.teacher)) if kind in (WHOLE, CHUNKS, LAYERS) else None
    losses = {LABELS: [LabelsLoss()], LAYERS: [HiddenStatesLoss()]}.get(kind, [LogitsLoss(), LabelsLoss(weight=0.5)])
    # Losses that ask for a teacher are shown the stored one below.
    source = teacher or LiveTeacher(student)
    shapes = {None: ModelShape.of(source.model)}
    distillation = Distillation(student, losses, source, shapes, chunks=ChunkSettings(chunk_size))
    student.requires_grad_(True).train()
    distillation.start()
    size = (options.batch_size, options.length)
    ids = torch.randint(0, options.vocabulary, size, device=device)
    mask = torch.ones_like(ids)
    for row in range(options.batch_size):  # half of the rows are padded, by a quarter
        mask[row, options.length * (4 - row % 2) // 4 :] = 0
    inputs = {"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, -100)}
    counts = distillation.counts([inputs], device)
    stored = Signals()
    if kind == TOP:
        generator = torch.Generator(device).manual_seed(0)
        values = torch.randn(*size, K, device=device, generator=generator).sort(-1, descending=True).values
        words = torch.rand(*size, options.vocabulary, device=device, generator=generator).topk(K).indices
        stored = Signals(top_logits=TopLogits(values, words, {2.0: values[..., 0] + 1}, options.vocabulary))

    def step() -> None:
        with torch.autocast(device.type, torch.bfloat16, enabled=options.bf16):
            signals = stored if teacher is None else distillation.teacher_signals(inputs)
            distillation.show(signals, inputs)
            outputs = student(**{name: value for name, value in inputs.items() if name != "labels" or distillation.needs_labels})
            parts = distillation.parts(outputs, signals, inputs, counts, lambda shown, count: shown["loss"])
            loss = torch.stack([value * weight for value, weight in parts.values()]).sum()
        loss.backward()

    step()  # gradients are there from here on, as in every step but the first
    seconds = []
    for _ in range(options.rounds):
        started = time.process_time() if device.type == "cpu" else time.perf_counter()
        step()
        if device.type == "cuda":
            torch.cuda.synchronize()
        seconds.append((time.process_time() if device.type == "cpu" else time.perf_counter()) - started)
    gc.collect()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step()
        rise = torch.cuda.max_memory_allocated() - before
    else:
        ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")  # sets VmHWM back to what is held now
        before = memory("VmRSS")
        step()
        rise = memory("VmHWM") - before
    return {"bytes": rise, "seconds": statistics.median(seconds)}


def main() -> int:
    """Measure each case in a process of its own, print the table, and say which bar is missed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--bf16", action="store_true", help="under autocast")
    parser.add_argument("--vocabulary", type=int, default=50257)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--student", default="256x4", metavar="WIDTHxLAYERS")
    parser.add_argument("--teacher", default="512x4", metavar="WIDTHxLAYERS")
    parser.add_argument("--chunk-sizes", type=int, nargs="*", default=[64])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", metavar="FILE")
    parser.add_argument("--case", help=argparse.SUPPRESS)
    options = parser.parse_args()
    every = cases(options)
    if options.case is not None:
        print(json.dumps(measure(*every[options.case], options)))
        return 0

    facts: dict[str, Any] = {**machine(), "threads": options.threads}
    if options.device == "cuda":
        import torch

        facts["gpu"] = torch.cuda.get_device_name()
    one = options.batch_size * options.length * options.vocabulary * 4
    print(f"one tensor of batch x tokens x vocabulary in float32: {one / MEGABYTE:,.0f} MB\n")
    print("| case | MB at the peak | in such tensors | seconds a step | times whole logits |\n|---|---:|---:|---:|---:|")
    found: dict[str, dict[str, float]] = {}
    for case in every:
        command = [sys.executable, __file__, *sys.argv[1:], "--case", case]
        done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env={**os.environ, **ALLOCATOR})
        found[case] = json.loads(done.stdout.splitlines()[-1])
        times = found[case]["seconds"] / found[WHOLE]["seconds"]
        megabytes, tensors = found[case]["bytes"] / MEGABYTE, found[case]["bytes"] / one
        print(f"| {case} | {megabytes:,.0f} | {tensors:.2f} | {found[case]['seconds']:.3f} | {times:.2f} |", flush=True)
    least = min((found[case]["bytes"] for case, (kind, _) in every.items() if kind == CHUNKS), default=0.0)
    read, unread = found[f"{LAYERS}, whole"], found[LAYERS]
    bars = [
        Bar("layers: a step / the same with whole logits", unread["seconds"] / read["seconds"], 1.0),
        Bar("peak in the smallest chunks / whole logits", least / found[WHOLE]["bytes"], 0.25),
        Bar("peak in the smallest chunks, in tensors of batch x tokens x vocabulary", least / one, 1.0),
    ]
    shapes = {name: getattr(options, name) for name in ("vocabulary", "batch_size", "length", "student", "teacher", "device", "bf16")}
    return finish(Path(__file__).stem, facts, bars, {"cases": found, "shapes": shapes}, options.json)


if __name__ == "__main__":
    sys.exit(main())
