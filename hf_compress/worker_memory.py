"""New memory for what a batch brings: in a DataLoader's worker it is shared, so that tensors in it need no copy to leave the process."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import get_worker_info


def new_bytes(size: int) -> Tensor:
    """(size,) uint8, with anything in it.

    numpy asks the system for huge pages, so that the first writing does not stumble at every 4096 bytes.
    """
    if get_worker_info() is None:
        return torch.from_numpy(np.empty(size, np.uint8))
    shared = torch.UntypedStorage._new_shared(size)  # type: ignore[no-untyped-call]
    return torch.empty(0, dtype=torch.uint8).set_(shared)
