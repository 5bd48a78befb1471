"""Attention: the student's against the teacher's, head by head, as scores or as distributions."""

from __future__ import annotations

import logging
from dataclasses import dataclass, field, replace
from typing import ClassVar

import torch
from torch import Tensor

from hf_compress.errors import LossError
from hf_compress.layers.layer_map import LayerMap
from hf_compress.losses.hidden_states import Pairs, compared_pairs, refuse_without_tokens, stacks_in_both
from hf_compress.losses.loss import Loss, Phase
from hf_compress.losses.reduction import Batch, divergence, full_precision, masked_sum, tokens_of, visible_keys
from hf_compress.signals import AttentionScores, Signals, SignalSpec
from hf_compress.task import ModelShape, Stack

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class AttentionScoresLoss(Loss):
    """Compare attention scores, QK^T/sqrt(d) before mask and softmax (TinyBERT 1909.10351, eq. 7); in T5 with what it adds for positions.

        mean over heads, mean over the keys a query may see, of (a_S - a_T)^2,  over real queries; layers are added up

    Scores, not probabilities: TinyBERT found them to converge faster and to better students. Both models need the same number of
    heads; where they have not, leave this loss out and keep the hidden states.

    Attributes:
        layer_map: as in `HiddenStatesLoss`; attention has no layer 0.
        skip_heads: leave a teacher's head out, example by example, where its mean attention on separator tokens is above this share
            (0 to 1): such heads "do nothing", and teach nothing. None, the default, keeps all.
        stack: as in `HiddenStatesLoss`.
        required: raise where the two models' attention cannot be compared; False leaves the loss out there, and says so in the log.
        pairs: which of the map's pairs to compare, as in `HiddenStatesLoss`.
        weight: see `Loss`.

    Example:
        >>> AttentionScoresLoss(LayerMap.uniform(4, 12)).layer_map.pairs[0]
        (1, 3)
    """

    name: ClassVar[str] = "attention_scores"
    phase: ClassVar[Phase] = "intermediate"
    sees_attention: ClassVar[bool] = True
    layer_map: LayerMap | str | None = None
    skip_heads: float | None = None
    stack: str | None = None
    required: bool = field(default=True, kw_only=True)
    pairs: Pairs = field(default="all", kw_only=True)

    def __post_init__(self) -> None:
        if self.skip_heads is not None and not 0 < self.skip_heads < 1:
            raise LossError(f"skip_heads is {self.skip_heads}; it is a share of attention, between 0 and 1.")
        if isinstance(self.layer_map, LayerMap) and any(0 in pair for pair in self.layer_map.pairs):
            raise LossError("Layer 0 is the embedding output: it has no attention. Number layers from 1.")

    def __str__(self) -> str:
        return f"{super().__str__()} (student:teacher {self.layer_map})"

    def resolve(self, student: ModelShape, teacher: ModelShape) -> tuple[Loss, ...]:
        """Choose stacks, fill in the layer map, and compare the numbers of heads."""
        try:
            return self._resolve(student, teacher)
        except LossError as error:
            if self.required:
                raise
            logger.info("%s are left out: %s", self.name.replace("_", " "), error)
            return ()

    def _resolve(self, student: ModelShape, teacher: ModelShape) -> tuple[Loss, ...]:
        check_attention(self, student, teacher)
        resolved = []
        for name in stacks_in_both(self, student, teacher):
            ours, theirs = student.stacks[name], teacher.stacks[name]
            # A flag's map serves the hidden states too; its pairs with layer 0, which has no attention, are theirs alone.
            layer_map = LayerMap(compared_pairs(ours, theirs, self.layer_map, self.pairs, first_layer=1))
            check_heads(self, ours, theirs, "layers " + ", ".join(f"{a}:{b}" for a, b in layer_map.pairs))
            resolved.append(replace(self, layer_map=layer_map, stack=name))
        return tuple(resolved)

    @property
    def unit(self) -> str:
        """Real queries, which are the real tokens."""
        return tokens_of(self.stack or "")

    def student_spec(self) -> SignalSpec:
        """The mapped layers' scores."""
        return SignalSpec(attention_scores=frozenset(AttentionScores(self.stack or "", layer) for layer, _ in self._pairs))

    def teacher_spec(self) -> SignalSpec:
        """The mapped layers' scores."""
        return SignalSpec(attention_scores=frozenset(AttentionScores(self.stack or "", layer) for _, layer in self._pairs))

    def __call__(self, student: Signals, teacher: Signals, batch: Batch) -> Tensor:
        """Sum over layers and real queries."""
        real = batch.token_masks[self.stack or ""]  # (batch, tokens)
        keys = visible_keys(real, causal=self.stack in batch.causal_stacks)  # (batch, 1, queries, keys)
        total = torch.zeros((), device=real.device)
        for student_layer, teacher_layer in self._pairs:
            ours = full_precision(student.attention_scores[AttentionScores(self.stack or "", student_layer)])
            theirs = full_precision(teacher.attention_scores[AttentionScores(self.stack or "", teacher_layer)])
            total = total + masked_sum(self._over_heads(self._per_query(ours, theirs, keys), theirs, keys, batch), real)
        return total

    def _per_query(self, student: Tensor, teacher: Tensor, keys: Tensor) -> Tensor:
        """(batch, heads, queries, keys) twice -> (batch, heads, queries)."""
        # In place of a where(): one pass less over (batch, heads, queries, keys), the largest tensors of the step.
        return (student - teacher).masked_fill(~keys, 0.0).pow(2).sum(-1) / keys.sum(-1).clamp(min=1)

    def _over_heads(self, per_query: Tensor, scores: Tensor, keys: Tensor, batch: Batch) -> Tensor:
        """(batch, heads, queries) -> (batch, queries)."""
        if self.skip_heads is None:
            return per_query.mean(1)
        if batch.separators is None:
            raise LossError("skip_heads needs to know the separator tokens: give the trainer the tokenizer (processing_class=tokenizer).")
        probabilities = scores.masked_fill(~keys, torch.finfo(scores.dtype).min).softmax(-1)
        on_separators = (probabilities * batch.separators[:, None, None, :]).sum(-1)  # (batch, heads, queries)
        real = batch.token_masks[self.stack or ""][:, None]
        share = torch.where(real, on_separators, 0.0).sum(-1) / real.sum(-1)  # (batch, heads)
        kept = (share <= self.skip_heads).float()[..., None]
        return (per_query * kept).sum(1) / kept.sum(1).clamp(min=1)

    @property
    def _pairs(self) -> tuple[tuple[int, int], ...]:
        assert isinstance(self.layer_map, LayerMap), "resolve() comes first"
        return self.layer_map.pairs


@dataclass(frozen=True)
class AttentionsLoss(AttentionScoresLoss):
    """Compare where attention goes: the distributions that the softmax makes of the scores (MiniLM 2002.10957, eq. 3).

        mean over heads of KL(softmax(a_T) || softmax(a_S)),  over real queries; padding, and what comes later, is no key

    MiniLM compares the last layers alone, MobileBERT (2004.02984, section 3.3) all of them. A constant added to a query's scores
    changes no distribution, so this leaves the student more room than `AttentionScoresLoss`, which TinyBERT found to teach better where
    all layers are compared. A window that attention is limited to (sliding, local) is not looked at: all real keys count.

    Attributes: as in `AttentionScoresLoss`.

    Example:
        >>> str(AttentionsLoss(LayerMap.uniform(6, 12), pairs="last", weight=0.5).layer_map)
        '1:2,2:4,3:6,4:8,5:10,6:12'
    """

    name: ClassVar[str] = "attentions"

    def _per_query(self, student: Tensor, teacher: Tensor, keys: Tensor) -> Tensor:
        """See `AttentionScoresLoss`."""
        return divergence(student, teacher, keys)


def check_attention(loss: Loss, student: ModelShape, teacher: ModelShape) -> None:
    """Refuse models whose scores cannot be seen.

    Raises:
        LossError: naming the model.
    """
    refuse_without_tokens(loss, student)
    for shape in (student, teacher):
        if not shape.shows_attention_scores:
            raise LossError(
                f"{shape.name} computes its attention in a way of its own, or is on disk without it: its scores cannot be seen. Leave "
                f"it out: --distill_weights {loss.name}=0, or the recipe logits, distilbert or pkd."
            )


def check_heads(loss: Loss, student: Stack, teacher: Stack, layers: str) -> None:
    """Refuse stacks of other numbers of heads.

    Raises:
        LossError: naming both, and the layers.
    """
    ours, theirs = student.num_attention_heads, teacher.num_attention_heads
    if ours != theirs:
        raise LossError(
            f"Attention is compared head by head, but the student has {ours} heads and the teacher {theirs} ({layers}). Give the student "
            f"{theirs} heads, or leave the attention out: --distill_weights {loss.name}=0, or the recipe distilbert or pkd."
        )
