"""Of a language model's predictions, each token's k largest logits and the others as one: how they are named, written and read.

logits.values     (tokens, k)  falling, less the middle between the first and the last      int8, half precision or float32
logits.scales     (tokens)     int8: one a token                                            float32
logits.ids        (tokens, k)  the words' numbers, their low 16 bits                        uint16
logits.high_ids   (tokens, k)  their high 8 bits; only where the vocabulary is above 65,536 uint8
logits.rest.2     (tokens)     T * log sum exp(z / T) of all other words at T = 2, less that middle; one such column a temperature   float32

A softmax does not see the middle taken off; half as large numbers are written half as coarsely.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hf_compress.cache.codec import encode
from hf_compress.cache.codec_name import CodecName
from hf_compress.cache.shard import Column
from hf_compress.errors import ArgumentError
from hf_compress.signals import HeadStates
from hf_compress.top_logits import TopLogits

VALUES, SCALES, IDS, HIGH_IDS, REST = "logits.values", "logits.scales", "logits.ids", "logits.high_ids", "logits.rest."
_LOW_BITS = 16
_LARGEST_VOCABULARY = 1 << 24
# Numbers of tokens x vocabulary that are made at a time.
_AT_ONCE = 2**25


@dataclass(frozen=True)
class TopK:
    """How much of each token's logits is stored.

    Attributes:
        k: how many.
        temperatures: at which the others are summed up; rising.
    """

    k: int
    temperatures: tuple[float, ...]

    @classmethod
    def of(cls, columns: Iterable[Column]) -> TopK | None:
        """That of a cache with these columns; None where logits are whole, or there are none."""
        known = {column.name: column for column in columns}
        if IDS not in known:
            return None
        (k,) = known[IDS].item
        return cls(k, temperatures_of(known))

    @classmethod
    def asked_for(cls, k: int, vocabulary: int, temperatures: Iterable[float]) -> TopK:
        """That of a cache which is to be built: temperature 1, at which several recipes compare, goes with any.

        Raises:
            ArgumentError: the vocabulary has no more words than are to be kept, or more than can be named.
        """
        if k >= vocabulary:
            raise ArgumentError(
                f"--teacher_cache_logits_top_k {k}: the teacher's vocabulary has {vocabulary} words, so that is all of them. Give fewer, "
                "or leave it out."
            )
        if vocabulary > _LARGEST_VOCABULARY:
            raise ArgumentError(f"--teacher_cache_logits_top_k: the vocabulary has {vocabulary} words; at most 2^24 can be named.")
        return cls(k, tuple(sorted({1.0, *temperatures})))

    def of_head(self, head: HeadStates, real: Tensor) -> TopLogits:
        """What is kept of real tokens, some of them at a time; zeros at padding.

        Args:
            head: what a teacher showed.
            real: (batch, tokens) bool, where the teacher is.
        """
        places = real.flatten().nonzero().squeeze(1)
        states = head.states.flatten(0, 1)
        parts: list[TopLogits] = []
        size = vocabulary = 1
        start = 0
        while start < len(places):
            logits = head.logits(states[places[start : start + size]]).float()
            parts.append(TopLogits.of(logits, self.k, self.temperatures))
            start += size
            vocabulary = logits.shape[-1]
            size = max(1, _AT_ONCE // vocabulary)

        def whole(taken: Sequence[Tensor]) -> Tensor:
            joined = torch.cat(list(taken))
            full = joined.new_zeros(real.numel(), *joined.shape[1:])
            full[places] = joined
            return full.view(*real.shape, *joined.shape[1:])

        rest = {temperature: whole([part.rest[temperature] for part in parts]) for temperature in self.temperatures}
        return TopLogits(whole([part.values for part in parts]), whole([part.ids for part in parts]), rest, vocabulary)

    def blank(self, tokens: int, vocabulary: int) -> TopLogits:
        """Made-up ones, of one example of so many tokens."""
        rest = {temperature: torch.zeros(1, tokens) for temperature in self.temperatures}
        return TopLogits(torch.zeros(1, tokens, self.k), torch.zeros(1, tokens, self.k, dtype=torch.int64), rest, vocabulary)

    def describe(self) -> str:
        """For people: `the 64 largest logits (all others as one, at T = 1 and 2)`."""
        return f"the {self.k} largest logits (all others as one, at T = {' and '.join(f'{each:g}' for each in self.temperatures)})"


def rest_column(temperature: float) -> str:
    """Where the others are summed up at a temperature."""
    return REST + repr(float(temperature)).removesuffix(".0")


def temperatures_of(names: Iterable[str]) -> tuple[float, ...]:
    """At which temperatures the others are summed up, rising."""
    return tuple(sorted(float(name.removeprefix(REST)) for name in names if name.startswith(REST)))


def bytes_a_token(columns: Iterable[Column]) -> int:
    """What a token's predictions take, all of its columns together."""
    return sum(column.row_bytes for column in columns if column.name.startswith("logits."))


def columns_of(top: TopLogits, real: Tensor, codec: CodecName) -> dict[str, Tensor]:
    """They as they are stored: by column, (real tokens, ...).

    Args:
        top: (batch, tokens, k).
        real: (batch, tokens) bool, on the CPU.
        codec: how values are written.
    """
    values, ids = top.values.float().cpu()[real], top.ids.cpu()[real]
    middle = (values[:, :1] + values[:, -1:]) / 2
    columns = {f"logits.{part}": numbers for part, numbers in encode(values - middle, codec).items()}
    columns[IDS] = (ids & (1 << _LOW_BITS) - 1).to(torch.uint16)
    if top.vocabulary > 1 << _LOW_BITS:
        columns[HIGH_IDS] = (ids >> _LOW_BITS).to(torch.uint8)
    for temperature, others in sorted(top.rest.items()):
        columns[rest_column(temperature)] = others.float().cpu()[real] - middle[:, 0]
    return columns


def read_top_logits(column: Mapping[str, Tensor], values: Tensor, temperatures: Iterable[float], vocabulary: int) -> TopLogits:
    """Put them together.

    Args:
        column: (batch, tokens, ...) by name, zeros at padding.
        values: (batch, tokens, k), decoded.
        temperatures: that are wanted.
        vocabulary: the teacher's number of words.
    """
    ids = column[IDS].to(torch.int64)
    if HIGH_IDS in column:
        ids = ids | column[HIGH_IDS].to(torch.int64) << _LOW_BITS
    return TopLogits(values, ids, {temperature: column[rest_column(temperature)] for temperature in temperatures}, vocabulary)


def top_facts(columns: Sequence[Column]) -> dict[str, Any] | None:
    """What there is to say of them in plain JSON; None where logits are whole, or there are none."""
    top = TopK.of(columns)
    if top is None:
        return None
    return {"k": top.k, "temperatures": list(top.temperatures), "bytes_a_token": bytes_a_token(columns)}
