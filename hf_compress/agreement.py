"""What several processes must agree on: an error on one is an error on all, in the same words, and nobody waits for who is gone.

with all_or_none():     each process does its part
    ...                 -> gathered once: all go on, or all raise
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

from torch import distributed

from hf_compress.errors import CompressionError

T = TypeVar("T")
# Every process's list, joined by rank, the same on all.
Gather = Callable[[list[Any]], list[Any]]


def several() -> bool:
    """Whether there are other processes in this run."""
    return distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1


def from_all(own: T) -> list[T]:
    """What each process has, by rank; all of them have to ask."""
    if not several():
        return [own]
    found: list[Any] = [None] * distributed.get_world_size()
    distributed.all_gather_object(found, own)
    return found


def joined(own: list[Any]) -> list[Any]:
    """Every process's list, one after the other."""
    return [item for items in from_all(own) for item in items]


@contextmanager
def all_or_none(gather: Gather = joined) -> Iterator[None]:
    """A block that every process goes through: where it fails on one, it fails on all.

    Args:
        gather: joins the processes' lists.

    Raises:
        CompressionError: what the first process that failed said. A process that failed itself raises its own error.
    """
    own: Exception | None = None
    try:
        yield
    except Exception as error:
        own = error
    told = [None if own is None else own if isinstance(own, CompressionError) else CompressionError(f"{type(own).__name__}: {own}")]
    first = next((error for error in gather(told) if error is not None), None)
    if own is not None:
        raise own
    if first is not None:
        raise first
