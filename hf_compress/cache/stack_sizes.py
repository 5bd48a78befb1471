"""What of a teacher's sizes decides how many bytes its signals take."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import NamedTuple

from hf_compress.signals import VectorKind

_NONE: Mapping[VectorKind, tuple[int, int]] = MappingProxyType({})


class StackSizes(NamedTuple):
    """The sizes of one stack of layers.

    Attributes:
        hidden_size: width of a hidden state.
        num_attention_heads: heads of attention scores.
        vectors: number and width of the heads of queries, keys and values, those that may be stored.
    """

    hidden_size: int
    num_attention_heads: int
    vectors: Mapping[VectorKind, tuple[int, int]] = _NONE
