"""Parameters that are split up among processes: made whole for as long as something reads them, or never split up at all.

While a config of ZeRO-3 is in force (from `TrainingArguments(deepspeed=...)` on), transformers' `from_pretrained` leaves each process with
a part of each parameter, whose shape is then (0,); only the engine that trains a model knows how to gather them in its forward. FSDP2
splits a model up when it is wrapped.
"""

from __future__ import annotations

import contextlib
import copy
import sys
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor


def is_split(model: nn.Module) -> bool:
    """Whether processes hold parts of the model's parameters, so that a forward is one of all processes together."""
    return any(isinstance(parameter, DTensor) or hasattr(parameter, "ds_id") for parameter in model.parameters())


def is_split_by_zero(model: nn.Module) -> bool:
    """Whether ZeRO-3 has split up any parameter of the model."""
    return any(hasattr(parameter, "ds_id") for parameter in model.parameters())


def num_elements(parameter: nn.Parameter) -> int:
    """Of the whole parameter, on all processes together."""
    return int(getattr(parameter, "ds_numel", parameter.numel()))


def split_again(model: nn.Module) -> None:
    """Undo what a forward without a backward leaves under FSDP2: parameters of the outermost module that are whole.

    An optimizer that is made then would hold those, and FSDP2 trains the parts.
    """
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


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
    """Within it `from_pretrained` gives each process the whole model, whatever config of DeepSpeed is in force."""
    config = config_in_force()
    if config is None:
        yield
        return
    integration = sys.modules["transformers.integrations.deepspeed"]
    integration.unset_hf_deepspeed_config()
    try:
        yield
    finally:
        integration.set_hf_deepspeed_config(config)


def config_in_force() -> Any:
    """transformers' object with the config of ZeRO-3 that splits up what is loaded now; None without ZeRO-3."""
    integration: Any = sys.modules.get("transformers.integrations.deepspeed")
    if integration is None or not integration.is_deepspeed_zero3_enabled():
        return None
    return integration._hf_deepspeed_config_weak_ref()


def forget_unused_renamings(model: nn.Module) -> None:
    """Have a model that was loaded under ZeRO-3 saved with the names of its own weights, as it is without.

    There transformers takes the older names that a file might have had (`LayerNorm.gamma`) for those that it had, and writes them again.
    """
    conversions = getattr(model, "_weight_conversions", None)
    if conversions and is_split(model):
        model._weight_conversions = [each for each in conversions if each.was_used()]  # type: ignore[assignment]


def whole_copy(model: Any) -> Any:
    """The same model once more with all of its parameters on each process, on the CPU; all processes have to call it together.

    Args:
        model: of transformers, split up by ZeRO-3.
    """
    with whole_parameters(model), torch.random.fork_rng(devices=[]):
        copied = type(model)(copy.deepcopy(model.config))
        copied.load_state_dict({name: tensor.detach().cpu() for name, tensor in model.state_dict().items()})
    return copied.to(next(model.parameters()).dtype)
