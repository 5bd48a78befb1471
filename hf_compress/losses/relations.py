"""Relations: how alike the queries of an example's tokens are to one another, its keys, its values; the student's against the teacher's."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from typing import ClassVar, Literal

import torch
from torch import Tensor

from hf_compress.errors import LossError
from hf_compress.layers.layer_map import LayerMap
from hf_compress.losses.hidden_states import Pairs, compared_pairs, refuse_without_tokens, stacks_in_both
from hf_compress.losses.loss import Loss, Phase
from hf_compress.losses.reduction import Batch, divergence, full_precision, masked_sum, tokens_of, visible_keys
from hf_compress.signals import AttentionVectors, Signals, SignalSpec, VectorKind
from hf_compress.task import ModelShape, Stack

RelationHeads = Literal["auto", "own"]
# MiniLMv2's relation heads: 48 of BERT-base's 768 dimensions, 64 of BERT-large's 1024.
_WIDTH = 16


@dataclass(frozen=True)
class RelationsLoss(Loss):
    """Compare relations of one kind of vectors; use `QueryRelationsLoss`, `KeyRelationsLoss` or `ValueRelationsLoss`.

        R = softmax(A A^T / sqrt(d)),  A the (tokens, d) vectors of one relation head
        mean over relation heads of KL(R_T || R_S),  over real tokens

    (MiniLMv2 2012.15828, eq. 5-8; with `relation_heads="own"` and values, MiniLM 2002.10957, eq. 6.) A token is related to the
    tokens that attention may let it see: real ones, and none that comes later where the model looks back only.

    The relation heads are cut from the vectors of all attention heads, one after another's; so the models need as many relation
    heads, but neither as many attention heads nor the same width, and there is nothing to project. One layer is compared, and the student's
    others are left free; `HiddenStatesLoss` binds each of them.

    Attributes:
        layer_map: as in `HiddenStatesLoss`; attention has no layer 0. "6:21" takes the teacher's layer 21, as the paper does for
            BERT-large, whose last layers teach less well.
        relation_heads: how many; it has to divide the width of both models' vectors. "auto" is as the paper has it, one for each 16 of the
            teacher's dimensions, or the next smaller number that divides both. "own" is each model's own heads, equally many.
        pairs: which of the map's pairs to compare; the papers take the last.
        stack: as in `HiddenStatesLoss`.
        weight: see `Loss`.
    """

    phase: ClassVar[Phase] = "intermediate"
    sees_attention: ClassVar[bool] = True
    kind: ClassVar[VectorKind]
    layer_map: LayerMap | str | None = None
    relation_heads: int | RelationHeads = "auto"
    pairs: Pairs = field(default="last", kw_only=True)
    stack: str | None = field(default=None, kw_only=True)

    def __post_init__(self) -> None:
        known = self.relation_heads in ("auto", "own") if isinstance(self.relation_heads, str) else self.relation_heads >= 1
        if not known:
            raise LossError(f"relation_heads is {self.relation_heads!r}; it is a number of at least 1, 'auto' or 'own'.")
        if isinstance(self.layer_map, LayerMap) and any(0 in pair for pair in self.layer_map.pairs):
            raise LossError("Layer 0 is the embedding output: it has no attention. Number layers from 1.")

    def __str__(self) -> str:
        return f"{super().__str__()} ({self.relation_heads} heads, student:teacher {self.layer_map})"

    def resolve(self, student: ModelShape, teacher: ModelShape) -> tuple[Loss, ...]:
        """Choose stacks, fill in the layer map, and settle the number of relation heads."""
        refuse_without_tokens(self, student)
        for shape in (student, teacher):
            if not shape.shows_attention_vectors:
                raise LossError(
                    f"{shape.name} computes its attention in a way of its own (as where queries and values have heads of other widths), or "
                    f"is on disk without it: its {self.kind} cannot be seen. Leave them out: --distill_weights {self.name}=0, or take "
                    "the recipe logits, distilbert or pkd."
                )
        resolved = []
        for name in stacks_in_both(self, student, teacher):
            ours, theirs = student.stacks[name], teacher.stacks[name]
            pairs = LayerMap(compared_pairs(ours, theirs, self.layer_map, self.pairs, first_layer=1))
            resolved.append(replace(self, layer_map=pairs, stack=name, relation_heads=self._heads(ours, theirs)))
        return tuple(resolved)

    def _heads(self, student: Stack, teacher: Stack) -> int:
        (own, width), (teachers_own, teachers_width) = student.vectors(self.kind), teacher.vectors(self.kind)
        if self.relation_heads == "own":
            if own != teachers_own:
                raise LossError(
                    f"The student has {own} heads of {self.kind} and the teacher {teachers_own}, so their own heads cannot be compared one "
                    "by one. Cut both alike: relation_heads='auto' (the recipe minilmv2)."
                )
            return own
        total, teachers_total = own * width, teachers_own * teachers_width
        if self.relation_heads == "auto":
            most = max(1, teachers_total // _WIDTH)
            return max(count for count in range(1, most + 1) if math.gcd(total, teachers_total) % count == 0)
        assert isinstance(self.relation_heads, int)
        if total % self.relation_heads or teachers_total % self.relation_heads:
            raise LossError(
                f"{self.relation_heads} relation heads do not divide the {self.kind} of both models: the student's are {total} wide and "
                f"the teacher's {teachers_total}. Take a number that divides {math.gcd(total, teachers_total)}, or 'auto'."
            )
        return self.relation_heads

    @property
    def unit(self) -> str:
        """Real tokens."""
        return tokens_of(self.stack or "")

    def student_spec(self) -> SignalSpec:
        """The mapped layers' vectors."""
        return SignalSpec(attention_vectors=frozenset(AttentionVectors(self.stack or "", layer, self.kind) for layer, _ in self._pairs))

    def teacher_spec(self) -> SignalSpec:
        """The mapped layers' vectors."""
        return SignalSpec(attention_vectors=frozenset(AttentionVectors(self.stack or "", layer, self.kind) for _, layer in self._pairs))

    def __call__(self, student: Signals, teacher: Signals, batch: Batch) -> Tensor:
        """Sum over layers and real tokens."""
        real = batch.token_masks[self.stack or ""]  # (batch, tokens)
        visible = visible_keys(real, causal=self.stack in batch.causal_stacks)
        total = torch.zeros((), device=real.device)
        for student_layer, teacher_layer in self._pairs:
            ours = self._relations(student.attention_vectors[AttentionVectors(self.stack or "", student_layer, self.kind)], real)
            with torch.no_grad():
                theirs = self._relations(teacher.attention_vectors[AttentionVectors(self.stack or "", teacher_layer, self.kind)], real)
            total = total + masked_sum(divergence(ours, theirs, visible).mean(1), real)
        return total

    def _relations(self, vectors: Tensor, real: Tensor) -> Tensor:
        """(batch, heads, tokens, head width) -> (batch, relation heads, tokens, tokens), before the softmax."""
        assert isinstance(self.relation_heads, int), "resolve() comes first"
        # What stands at padding may be NaN, and 0 * NaN, in the gradient of the product, is NaN.
        vectors = full_precision(vectors).masked_fill(~real[:, None, :, None], 0.0)
        if vectors.shape[1] != self.relation_heads:
            batch, _, tokens, _ = vectors.shape
            vectors = vectors.transpose(1, 2).reshape(batch, tokens, self.relation_heads, -1).transpose(1, 2)
        return (vectors / math.sqrt(vectors.shape[-1])) @ vectors.transpose(-1, -2)

    @property
    def _pairs(self) -> tuple[tuple[int, int], ...]:
        assert isinstance(self.layer_map, LayerMap), "resolve() comes first"
        return self.layer_map.pairs


@dataclass(frozen=True)
class QueryRelationsLoss(RelationsLoss):
    """Relations between queries (MiniLMv2, Q-Q); see `RelationsLoss`.

    Example:
        >>> QueryRelationsLoss("6:21", relation_heads=48).layer_map
        '6:21'
    """

    name: ClassVar[str] = "query_relations"
    kind: ClassVar[VectorKind] = "queries"


@dataclass(frozen=True)
class KeyRelationsLoss(RelationsLoss):
    """Relations between keys (MiniLMv2, K-K); see `RelationsLoss`.

    Where keys are shared by groups of heads (grouped-query attention), there are fewer of them, and so less to cut relation heads from.

    Example:
        >>> KeyRelationsLoss(relation_heads=12, weight=1 / 3).relation_heads
        12
    """

    name: ClassVar[str] = "key_relations"
    kind: ClassVar[VectorKind] = "keys"


@dataclass(frozen=True)
class ValueRelationsLoss(RelationsLoss):
    """Relations between values (MiniLM and MiniLMv2, V-V); see `RelationsLoss`.

    Beside `AttentionsLoss`, which compares queries with keys, it is MiniLM's; beside Q-Q and K-K, MiniLMv2's.

    Example:
        >>> ValueRelationsLoss(relation_heads="own").pairs
        'last'
    """

    name: ClassVar[str] = "value_relations"
    kind: ClassVar[VectorKind] = "values"
