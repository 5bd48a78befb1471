"""What a teacher on disk would take, before there is a teacher or a data set: from sizes alone, by the arithmetic of a build.

selection, codec, signals, sizes  -->  bytes of an example of so many tokens, and bytes that all examples share
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor

from hf_compress.cache.codec_name import CodecName
from hf_compress.cache.encode import Encoder
from hf_compress.cache.fields import field_of, vector_shapes
from hf_compress.cache.manifest import Manifest
from hf_compress.cache.predictions import TopK, bytes_a_token
from hf_compress.cache.price import example_bytes
from hf_compress.cache.selection import Selection
from hf_compress.cache.shard import ONE_ROW
from hf_compress.cache.spaces import blank_spaces, spaces_bytes
from hf_compress.cache.stack_sizes import StackSizes
from hf_compress.cache.teacher_rows import TeacherRun, blank_signals
from hf_compress.errors import ArgumentError
from hf_compress.signals import HiddenState, Signals, SignalSpec


@dataclass(frozen=True)
class TeacherSizes:
    """What must be known of a teacher to tell what it takes on disk.

    Attributes:
        stacks: by stack, its sizes.
        logits: by name, the shape of one example's logits; -1 stands for its tokens.
        ranks: whether its attention can be seen, so that tokens can be ranked by it.
        top: how much of a language model's logits is stored; None for all.
    """

    stacks: Mapping[str, StackSizes]
    logits: Mapping[str, tuple[int, ...]]
    ranks: bool
    top: TopK | None = None

    @classmethod
    def of(cls, manifest: Manifest, stored: Selection) -> TeacherSizes:
        """Those of a finished cache's teacher, as far as it is stored.

        Args:
            manifest: the cache's.
            stored: its selection.
        """
        logits = {
            column.name.removesuffix(".values"): column.item if column.group == ONE_ROW else (-1, *column.item)
            for column in manifest.columns
            if column.name.endswith("logits.values")
        }
        top = TopK.of(manifest.columns)
        if top is not None:
            logits = {"logits": (-1, manifest.teacher.vocab_size)}
        vectors = vector_shapes({column.name: column.item for column in manifest.columns})
        stacks = {
            name: StackSizes(size["hidden_size"], size["num_attention_heads"], vectors.get(name, {}))
            for name, size in manifest.teacher.stacks.items()
        }
        ranked = any(column.name.endswith(".importance") for column in manifest.columns)
        return cls(stacks, logits, ranked or stored.needs_importance, top)


@dataclass(frozen=True)
class Estimate:
    """What one cache would take.

    Attributes:
        each: bytes of an example of the length asked for, its place in the index among them.
        shared: bytes that all examples share: chosen dimensions, a pca basis.
    """

    each: int
    shared: int

    def total(self, num_examples: int) -> int:
        """Bytes of so many examples; headers and the manifest, some kilobytes a shard, are not counted."""
        return self.each * num_examples + self.shared


class _Nobody:
    """No teacher: an estimate asks none."""

    def signals(self, inputs: Mapping[str, Tensor], spec: SignalSpec) -> Signals:
        raise AssertionError("an estimate needs no forward")

    def close(self) -> None:
        """Nothing is held."""


def estimate(spec: SignalSpec, selection: Selection, codec: CodecName, teacher: TeacherSizes, tokens: int) -> Estimate:
    """Tell what a cache takes.

    Args:
        spec: which signals it holds.
        selection: what is kept of hidden states.
        codec: number format of hidden states, attention scores and vectors.
        teacher: its sizes.
        tokens: real tokens of an example.

    Raises:
        ArgumentError: fewer than one token.
        TeacherError: tokens are to be ranked by an attention that cannot be seen.
    """
    if tokens < 1:
        raise ArgumentError(f"An example of {tokens} tokens has nothing to store; give how many an example has, 1 at least.")
    encoder, blank = blank_encoder(spec, selection, codec, teacher)
    return Estimate(int(example_bytes(encoder, blank)(tokens)), spaces_bytes(encoder.spaces))


def logits_bytes(codec: CodecName, teacher: TeacherSizes) -> int:
    """What a token's logits of a language model take."""
    encoder, blank = blank_encoder(SignalSpec(logits=True), Selection.everything(), codec, teacher)
    signals, importance = blank(1)
    real = torch.ones(1, 1, dtype=torch.bool)
    return bytes_a_token(encoder.encode(signals, real, ~real, importance).columns.values())


def blank_encoder(
    spec: SignalSpec, selection: Selection, codec: CodecName, teacher: TeacherSizes
) -> tuple[Encoder, Callable[[int], tuple[Signals, Mapping[HiddenState, Tensor]]]]:
    """The encoder of a cache, its shared dimensions not chosen yet; and made-up signals for it, of an example of so many tokens.

    Raises:
        TeacherError: tokens are to be ranked by an attention that cannot be seen.
    """
    spaces = blank_spaces(selection, {field_of(key): teacher.stacks[key.stack].hidden_size for key in spec.hidden_states})
    run = TeacherRun(_Nobody(), spec, selection, torch.device("cpu"), nullcontext, ranks=teacher.ranks, top=teacher.top)
    return Encoder(selection, codec, spaces), blank_signals(spec, run, teacher.stacks, teacher.logits)
