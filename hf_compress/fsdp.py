"""FSDP: each process holds a part of every parameter of the student, whole only while its layer runs.

What the losses read is taken inside the student's forward, as under DDP, and the projections are a part of the student, so nothing else
changes. The teacher is whole on every process. Layers are dropped, and projections attached, before the Trainer wraps the student.
"""

from __future__ import annotations

import os
from typing import Any

from hf_compress.errors import ArgumentError


def check_fsdp(trainer: Any) -> None:
    """See that a run that asks for FSDP gets it.

    Args:
        trainer: a transformers Trainer after its own set-up.

    Raises:
        ArgumentError: it runs on the CPU, asks for FSDP1, or would not train a part of the student.
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
    empty = [name for name, parameter in trainer.model.named_parameters() if parameter.is_meta]
    if empty:
        raise ArgumentError(
            f"Parts of the student have no values on this process ({', '.join(empty[:4])}), and would not be trained: FSDP's "
            "cpu_ram_efficient_loading makes what a checkpoint lacks, such as a new head, on the first process alone. Turn it off "
            "(--fsdp_config '{\"cpu_ram_efficient_loading\": false}'), or save the student once with its head, and start from there."
        )
