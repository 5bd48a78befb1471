"""Parameters that are split up among processes: made whole for as long as something reads them, or never split up at all.

While a config of ZeRO-3 is in force (from `TrainingArguments(deepspeed=...)` on), transformers' `from_pretrained` leaves each process with
a part of each parameter, whose shape is then (0,); only the engine that trains a model knows how to gather them in its forward. FSDP splits
a model up when it is wrapped; with `cpu_ram_efficient_loading` the first process alone reads the weights before that.
"""

from __future__ import annotations

import contextlib
import copy
import os
import sys
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor

_LOADS_ON_FIRST = "FSDP_CPU_RAM_EFFICIENT_LOADING"  # as transformers and accelerate read it


def is_split(model: nn.Module) -> bool:
    """Whether processes hold parts of the model's parameters, so that a forward is one of all processes together."""
    return any(isinstance(parameter, DTensor) or hasattr(parameter, "ds_id") for parameter in model.parameters())


def is_split_by_zero(model: nn.Module) -> bool:
    """Whether ZeRO-3 has split up any parameter of the model."""
    return any(hasattr(parameter, "ds_id") for parameter in model.parameters())


def num_elements(parameter: nn.Parameter) -> int:
    """Of the whole parameter, on all processes together."""
    return int(getattr(parameter, "ds_numel", parameter.numel()))


@contextlib.contextmanager
def whole_parameters(model: nn.Module) -> Iterator[None]:
    """Within it every parameter of `model` has its full shape, on each process; without ZeRO-3 it does nothing.

    All processes have to enter together.
    """
    parameters = list(model.parameters())
    if not is_split_by_zero(model):
        yield
        return
    import deepspeed

    with deepspeed.zero.GatheredParameters(parameters):
        yield


@contextlib.contextmanager
def loaded_whole() -> Iterator[None]:
    """Within it `from_pretrained` gives each process the whole model, whatever config of DeepSpeed or FSDP is in force.

    FSDP's cpu_ram_efficient_loading leaves the weights empty on all processes but the first until the Trainer wraps the model, and it
    never wraps a teacher.
    """
    config, on_first = config_in_force(), os.environ.get(_LOADS_ON_FIRST)
    integration: Any = sys.modules.get("transformers.integrations.deepspeed")
    if config is not None:
        integration.unset_hf_deepspeed_config()
    if on_first is not None:
        os.environ[_LOADS_ON_FIRST] = "false"
    try:
        yield
    finally:
        if config is not None:
            integration.set_hf_deepspeed_config(config)
        if on_first is not None:
            os.environ[_LOADS_ON_FIRST] = on_first


def config_in_force() -> Any:
    """transformers' object with the config of ZeRO-3 that splits up what is loaded now; None without ZeRO-3."""
    integration: Any = sys.modules.get("transformers.integrations.deepspeed")
    if integration is None or not integration.is_deepspeed_zero3_enabled():
        return None
    return integration._hf_deepspeed_config_weak_ref()


def whole_copy(model: Any) -> Any:
    """The same model once more with all of its parameters on each process, on the CPU; all processes have to call it together.

    Args:
        model: of transformers, split up by ZeRO-3.
    """
    with whole_parameters(model), torch.random.fork_rng(devices=[]):
        copied = type(model)(copy.deepcopy(model.config))
        copied.load_state_dict({name: tensor.detach().cpu() for name, tensor in model.state_dict().items()})
    return copied.to(next(model.parameters()).dtype)
