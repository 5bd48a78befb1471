"""How long models take over one batch. They take turns, so that what else the machine does slows all of them alike."""

from __future__ import annotations

import inspect
import platform
import statistics
import time
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from hf_compress.layers.stack import unwrap


def milliseconds_per_batch(models: Mapping[str, nn.Module], batch: Mapping[str, Any], *, repeats: int = 7) -> dict[str, float]:
    """Milliseconds of a forward without gradients: the median over `repeats` rounds, after one that goes unmeasured.

    Args:
        models: by name, on the batch's device; each gets the columns that its forward knows, and is left as it was.
        batch: tensors, without labels.
        repeats: rounds; each model has its turn in each.
    """
    seconds: dict[str, list[float]] = {name: [] for name in models}
    takes = {
        name: {key: batch[key] for key in inspect.signature(unwrap(model).forward).parameters if key in batch}
        for name, model in models.items()
    }
    training = {name: model.training for name, model in models.items()}
    try:
        with torch.no_grad():
            for turn in range(repeats + 1):
                for name, model in models.items():
                    model.eval()
                    _wait()
                    started = time.perf_counter()
                    model(**takes[name])
                    _wait()
                    if turn:
                        seconds[name].append(time.perf_counter() - started)
    finally:
        for name, model in models.items():
            model.train(training[name])
    return {name: 1000 * statistics.median(times) for name, times in seconds.items()}


def machine(device: torch.device) -> str:
    """Where it was measured, as in "CPU (x86_64, 2 threads)"."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    threads = torch.get_num_threads()
    return f"{device.type.upper()} ({platform.machine()}, {threads} thread{'s' if threads > 1 else ''})"


def _wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
