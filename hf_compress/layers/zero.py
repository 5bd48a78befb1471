"""Parameters that are split up among processes, and those of ZeRO-3 made whole for as long as something reads them."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor


def is_split(model: nn.Module) -> bool:
    """Whether processes hold parts of the model's parameters, so that a forward is one of all processes together."""
    return any(isinstance(parameter, DTensor) or hasattr(parameter, "ds_id") for parameter in model.parameters())


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
    if not any(hasattr(parameter, "ds_id") for parameter in parameters):
        yield
        return
    import deepspeed

    with deepspeed.zero.GatheredParameters(parameters):
        yield
