"""Signals of a batch -> the rows that a shard stores, without padding.

Values come off the teacher's device in one copy a column; numbers of several examples are one flat array, and counts say whose is whose.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from hf_compress.cache.codec import encode
from hf_compress.cache.codec_name import CodecName
from hf_compress.cache.fields import field_of, kept_group, queries_group, scores_group, selected_group, tokens_group
from hf_compress.cache.predictions import columns_of
from hf_compress.cache.select import select
from hf_compress.cache.selection import Selection
from hf_compress.cache.shard import Column
from hf_compress.cache.widths import pack_mask
from hf_compress.selected_state import KeptEntries, SelectedState, Space
from hf_compress.signals import HiddenState, Signals

Array = npt.NDArray[Any]


@dataclass
class Rows:
    """What one batch adds to a shard.

    Attributes:
        values: by column name, (rows, *item).
        columns: by name.
        counts: by group, (examples,) int64.
    """

    values: dict[str, Array] = field(default_factory=dict)
    columns: dict[str, Column] = field(default_factory=dict)
    counts: dict[str, npt.NDArray[np.int64]] = field(default_factory=dict)

    def add(self, name: str, group: str, values: Tensor) -> None:
        """Take a column in; bfloat16 goes as its bits."""
        values = values.detach().cpu().contiguous()
        dtype = str(values.dtype).removeprefix("torch.")
        array = values.view(torch.uint16).numpy() if values.dtype == torch.bfloat16 else values.numpy()
        self.values[name] = array
        self.columns[name] = Column(name, group, dtype, tuple(array.shape[1:]))

    def add_state(self, key: HiddenState, state: SelectedState, codec: CodecName, *, dense: bool) -> None:
        """Take a hidden state in.

        Args:
            key: which.
            state: what is kept of it.
            codec: how its numbers are written.
            dense: all tokens are kept, so that their positions need not be told.
        """
        name, chosen = field_of(key), state.chosen
        group = tokens_group(key.stack) if dense else selected_group(key.stack)
        self.counts[group] = chosen.sum(1).numpy().astype(np.int64)
        if not dense:
            self.add(f"{name}.positions", group, state.positions[chosen].to(torch.uint16))
        parts = encode(state.values[chosen], codec)
        if "scales" in parts:
            self.add(f"{name}.scales", group, parts["scales"])
        if not isinstance(state.space, KeptEntries):
            self.add(f"{name}.values", group, parts["values"])
            return
        # The kept numbers alone, and for each token which these are. A token that does not count keeps nothing, whatever its mask has.
        mask = state.space.mask[chosen]  # (rows, hidden)
        self.add(f"{name}.mask", group, pack_mask(mask))
        self.add(f"{name}.values", kept_group(key.stack), parts["values"][mask])
        kept = state.space.mask & chosen[..., None]
        self.counts[kept_group(key.stack)] = kept.flatten(1).sum(1).numpy().astype(np.int64)

    @staticmethod
    def joined(parts: Sequence[Rows]) -> Rows:
        """The rows of several batches, one after another's."""
        first = parts[0]
        return Rows(
            {name: np.concatenate([part.values[name] for part in parts]) for name in first.values},
            first.columns,
            {group: np.concatenate([part.counts[group] for part in parts]) for group in first.counts},
        )


class Encoder:
    """Encodes batches, all in one way.

    Args:
        selection: what is kept of hidden states; what is of attention is kept whole, and logits as they are given.
        codec: how hidden states, attention scores and vectors are written, and a language model's largest logits; others stay float32.
        spaces: by field, the dimensions that all its tokens share, on the CPU.
    """

    def __init__(self, selection: Selection, codec: CodecName, spaces: Mapping[str, Space]) -> None:
        self.selection, self.codec, self.spaces = selection, codec, spaces

    def encode(self, signals: Signals, real: Tensor, special: Tensor, importance: Mapping[HiddenState, Tensor]) -> Rows:
        """Encode one batch.

        Args:
            signals: the teacher's, of right-padded examples.
            real: (batch, tokens) bool, on the CPU, True where a token is real.
            special: (batch, tokens) bool, on the CPU.
            importance: (batch, tokens) on the CPU for each hidden state, where tokens are ranked by attention now or later.
        """
        rows = Rows()
        lengths = real.sum(1).numpy().astype(np.int64)
        for name, logits in sorted(signals.logits.items()):
            per_token = logits.dim() >= 2 and logits.shape[1] == real.shape[1] and (logits.dim() == 3 or name != "logits")
            values = logits.float().cpu()
            rows.add(f"{name}.values", tokens_group("layers") if per_token else "", values[real] if per_token else values)
            if per_token:
                rows.counts[tokens_group("layers")] = lengths
        if signals.top_logits is not None:
            for name, column in columns_of(signals.top_logits, real, self.codec).items():
                rows.add(name, tokens_group("layers"), column)
            rows.counts[tokens_group("layers")] = lengths
        for key, states in sorted(signals.hidden_states.items()):
            self._add_state(rows, key, states.float().cpu(), real, special, importance.get(key))
        for score_key, scores in sorted(signals.attention_scores.items()):
            self._add_scores(rows, field_of(score_key), score_key.stack, scores.float().cpu(), lengths)
        for vector_key, vectors in sorted(signals.attention_vectors.items()):
            self._add_vectors(rows, field_of(vector_key), vector_key.stack, vectors.float().cpu(), real)
            rows.counts[tokens_group(vector_key.stack)] = lengths
        return rows

    def _add_state(self, rows: Rows, key: HiddenState, states: Tensor, real: Tensor, special: Tensor, importance: Tensor | None) -> None:
        name, stack = field_of(key), key.stack
        selected = select(states, real, special, importance, self.selection, self.spaces.get(name))
        dense = self.selection.length == "all"
        if dense:
            rows.add(f"special.{stack}", tokens_group(stack), special[real].to(torch.uint8))
            if importance is not None:
                rows.add(f"{name}.importance", tokens_group(stack), importance[real].float())
        rows.add_state(key, selected, self.codec, dense=dense)

    def _add_scores(self, rows: Rows, name: str, stack: str, scores: Tensor, lengths: Array) -> None:
        """(batch, heads, tokens, tokens): the square of each example's real tokens."""
        heads = scores.shape[1]
        squares = [scores[example, :, :length, :length].reshape(heads * length, length) for example, length in enumerate(lengths.tolist())]
        parts = [encode(square, self.codec) for square in squares]
        rows.add(f"{name}.values", scores_group(stack), torch.cat([part["values"].flatten() for part in parts]))
        rows.counts[scores_group(stack)] = heads * lengths * lengths
        if parts and "scales" in parts[0]:
            rows.add(f"{name}.scales", queries_group(stack), torch.cat([part["scales"] for part in parts]))
            rows.counts[queries_group(stack)] = heads * lengths

    def _add_vectors(self, rows: Rows, name: str, stack: str, vectors: Tensor, real: Tensor) -> None:
        """(batch, heads, tokens, head width): a row a real token, all its heads; the shape of a row tells how many these are."""
        taken = vectors.transpose(1, 2)[real]  # (rows, heads, head width)
        parts = encode(taken.flatten(1), self.codec)
        rows.add(f"{name}.values", tokens_group(stack), parts["values"].view(taken.shape))
        if "scales" in parts:
            rows.add(f"{name}.scales", tokens_group(stack), parts["scales"])
