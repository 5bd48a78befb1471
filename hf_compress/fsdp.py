"""FSDP: each process holds a part of every parameter of the student, whole only while its layer runs.

What the losses read is taken inside the student's forward, as under DDP, and the projections are a part of the student, so nothing else
changes. The teacher is whole on every process. Layers are dropped, and projections attached, before the Trainer wraps the student.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from hf_compress.errors import ArgumentError

_LOADS_ON_FIRST = "FSDP_CPU_RAM_EFFICIENT_LOADING"  # as transformers and accelerate read it


def check_fsdp(trainer: Any) -> None:
    """See that a run that asks for FSDP gets it.

    Args:
        trainer: a transformers Trainer after its own set-up.

    Raises:
        ArgumentError: it runs on the CPU, or asks for FSDP1.
    """
    asked = bool(trainer.args.fsdp) or os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true"
    plugin = getattr(trainer.accelerator.state, "fsdp_plugin", None)
    if asked and plugin is None:
        raise ArgumentError(
            "FSDP is asked for (--fsdp, or accelerate launch --use_fsdp), and this run is on the CPU, where the Trainer passes over it and "
            "trains as DDP, with the whole student on each process. Leave it out, or run on GPUs."
        )
    if plugin is not None and getattr(plugin, "fsdp_version", 1) == 1:
        raise ArgumentError(
            "FSDP1 is asked for, which transformers has deprecated and hf_compress does not support. Take FSDP2: --fsdp_config "
            "'{\"version\": 2}', or accelerate launch --fsdp_version 2."
        )


@contextmanager
def loaded_whole() -> Iterator[None]:
    """A model that is loaded in this block has its weights on every process.

    FSDP's cpu_ram_efficient_loading has transformers read them on the first process alone, and leave them empty on the others until the
    Trainer wraps the model: it never wraps a teacher.
    """
    before = os.environ.get(_LOADS_ON_FIRST)
    if before is None:
        yield
        return
    os.environ[_LOADS_ON_FIRST] = "false"
    try:
        yield
    finally:
        os.environ[_LOADS_ON_FIRST] = before
