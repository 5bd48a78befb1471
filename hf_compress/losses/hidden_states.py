"""Layers: the student's hidden states against those of the teacher's layers that teach it."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from hf_compress.errors import LossError
from hf_compress.layers.layer_map import LayerMap
from hf_compress.losses.loss import Loss, Phase, Projection
from hf_compress.losses.reduction import Batch, full_precision, masked_sum, rows_of, selected_of, squared_error, tokens_of
from hf_compress.signals import HiddenState, Signals, SignalSpec
from hf_compress.task import ModelShape, Stack

HiddenStatesKind = Literal["mse", "cosine", "summary"]
ProjectionChoice = Literal["shared", "per_layer", "none"]
Pairs = Literal["all", "last", "all_but_last", "middle"]


@dataclass(frozen=True)
class HiddenStatesLoss(Loss):
    """Compare hidden states, layer by layer; the layers' values are added up.

        mse      mean_d (h_S - h_T)^2               over real tokens      TinyBERT 1909.10351, eq. 8
        cosine   1 - cos(h_S, h_T)                  over real tokens      DistilBERT 1910.01108
        summary  |h_S/|h_S| - h_T/|h_T||^2          over examples, at the summary token only      PKD 1908.09355, eq. 7

    The summary token is the first real one; the last real one for XLNet and where a token sees no later one.

    Where the widths differ, the student's state goes through a learnt linear map to the teacher's width. `shared`, TinyBERT's way, has
    one map for all layers; `per_layer` has one each, which fits closer and teaches the layers less. The maps are no part of
    the saved student.

    Attributes:
        layer_map: which teacher layer teaches which student layer: a map, or its name as in `--distill_layer_map`; None is what
            dropping left of the student, else a uniform map.
        kind: see above.
        projection: see above; "none" refuses models of different widths.
        stack: "encoder" or "decoder"; None is each stack the model has.
        pairs: which of the map's pairs to compare: DistilBERT takes the last, PKD all others, FitNets the middle one.
        weight: see `Loss`.

    Example:
        >>> HiddenStatesLoss(LayerMap.uniform(4, 12)).layer_map.pairs
        ((1, 3), (2, 6), (3, 9), (4, 12))
    """

    name: ClassVar[str] = "hidden_states"
    phase: ClassVar[Phase] = "intermediate"
    layer_map: LayerMap | str | None = None
    kind: HiddenStatesKind = "mse"
    projection: ProjectionChoice = "shared"
    stack: str | None = None
    pairs: Pairs = field(default="all", kw_only=True)
    # Filled in by resolve(): the widths of student and teacher, and whether the teacher has only part of its states.
    widths: tuple[int, int] = field(default=(0, 0), kw_only=True)
    selected: bool = field(default=False, kw_only=True)

    def __post_init__(self) -> None:
        if self.kind not in ("mse", "cosine", "summary"):
            raise LossError(f"{type(self).__name__} has no kind {self.kind!r}; it has 'mse', 'cosine' and 'summary'.")
        if self.projection not in ("shared", "per_layer", "none"):
            raise LossError(f"{type(self).__name__} has no projection {self.projection!r}; it has 'shared', 'per_layer' and 'none'.")

    def __str__(self) -> str:
        through = f", through {self.projection} projection {self.widths[0]} -> {self.widths[1]}" if self._projected else ""
        return f"{super().__str__()} ({self.kind}, student:teacher {self.layer_map}{through})"

    def resolve(self, student: ModelShape, teacher: ModelShape) -> tuple[Loss, ...]:
        """Choose stacks, fill in the layer map, and see whether a projection is needed."""
        refuse_without_tokens(self, student)
        resolved = []
        for name in stacks_in_both(self, student, teacher):
            ours, theirs = student.stacks[name], teacher.stacks[name]
            layer_map = self._map(ours, theirs)
            widths = (ours.hidden_size, theirs.hidden_size)
            if widths[0] != widths[1] and self.projection == "none":
                raise LossError(
                    f"The student's hidden size is {widths[0]} and the teacher's {widths[1]}, so their states can only be compared "
                    "through a projection: projection='shared' or 'per_layer'."
                )
            if self.kind != "mse":
                refuse_part_of_states(self, theirs, f" of the kind {self.kind!r}")
            resolved.append(replace(self, layer_map=layer_map, stack=name, widths=widths, selected=theirs.selected))
        return tuple(resolved)

    def _map(self, student: Stack, teacher: Stack) -> LayerMap:
        return LayerMap(compared_pairs(student, teacher, self.layer_map, self.pairs))

    @property
    def unit(self) -> str:
        """Real tokens, or those of them that were selected; rows (each choice is one) for the summary token."""
        if self.selected:
            return selected_of(self.stack or "")
        return rows_of(self.stack or "") if self.kind == "summary" else tokens_of(self.stack or "")

    @property
    def projections(self) -> dict[str, Projection]:
        """None where the widths agree."""
        if not self._projected:
            return {}
        return {self._projection_name(layer): Projection(*self.widths) for layer, _ in self._pairs}

    def student_spec(self) -> SignalSpec:
        """The mapped layers, projected."""
        return SignalSpec(hidden_states=frozenset(self._student_key(*pair) for pair in self._pairs))

    def teacher_spec(self) -> SignalSpec:
        """The mapped layers."""
        return SignalSpec(hidden_states=frozenset(HiddenState(self.stack or "", layer) for _, layer in self._pairs))

    def __call__(self, student: Signals, teacher: Signals, batch: Batch) -> Tensor:
        """Sum over layers and units."""
        if self.selected:
            return self._of_selected(student, teacher)
        mask = batch.token_masks[self.stack or ""]
        total = torch.zeros((), device=mask.device)
        for student_layer, teacher_layer in self._pairs:
            ours = full_precision(student.hidden_states[self._student_key(student_layer, teacher_layer)])
            theirs = full_precision(teacher.hidden_states[HiddenState(self.stack or "", teacher_layer)])
            if self.kind == "summary":
                token = summary_index(mask, last=self.stack in batch.summary_last)
                rows = torch.arange(len(token), device=token.device)
                difference = F.normalize(ours[rows, token], dim=-1) - F.normalize(theirs[rows, token], dim=-1)
                total = total + difference.pow(2).sum()
            elif self.kind == "cosine":
                theirs = theirs.masked_fill(~mask[..., None], 0.0)  # a NaN there would make the gradient NaN even behind a mask
                total = total + masked_sum(1 - F.cosine_similarity(ours, theirs, dim=-1), mask)
            else:
                total = total + squared_error(ours, theirs, mask) / ours.shape[-1]
        return total

    @property
    def _projected(self) -> bool:
        return self.widths[0] != self.widths[1]

    @property
    def _pairs(self) -> tuple[tuple[int, int], ...]:
        assert isinstance(self.layer_map, LayerMap), "resolve() comes first"
        return self.layer_map.pairs

    def _projection_name(self, layer: int) -> str:
        return f"{self.stack}_shared" if self.projection == "shared" else f"{self.stack}_layer_{layer}"

    def _student_key(self, layer: int, teacher_layer: int) -> HiddenState:
        name = self._projection_name(layer) if self._projected else ""
        return HiddenState(self.stack or "", layer, name, teacher_layer if self.selected else None)

    def _of_selected(self, student: Signals, teacher: Signals) -> Tensor:
        """Sum over layers and selected tokens."""
        parts = []
        for student_layer, teacher_layer in self._pairs:
            state = teacher.selected_states[HiddenState(self.stack or "", teacher_layer)]
            taken = full_precision(student.hidden_states[self._student_key(student_layer, teacher_layer)])
            ours, theirs, compared = state.space.compared(taken, full_precision(state.values))
            parts.append(squared_error(ours, theirs, state.chosen) / compared)
        return torch.stack(parts).sum()


@dataclass(frozen=True)
class EmbeddingsLoss(HiddenStatesLoss):
    """Compare the embedding outputs, what enters layer 1: `HiddenStatesLoss` on the pair 0:0 (TinyBERT, eq. 9).

    It shares its projection with `HiddenStatesLoss(projection="shared")`, as TinyBERT's released code does; "per_layer" gives it its own.
    """

    name: ClassVar[str] = "embeddings"

    def _map(self, student: Stack, teacher: Stack) -> LayerMap:
        return LayerMap(((0, 0),))


@dataclass(frozen=True)
class HintLoss(HiddenStatesLoss):
    """Compare the middle layers, through a learnt regressor (FitNets 1412.6550, eq. 3).

        mean_d (W h_S + b - h_T)^2,  over real tokens; the pair in the middle of the layer map

    The regressor is there whatever the widths: the student's middle layer shall be able to tell what the teacher's knows, not be equal to
    it. So it binds one layer, and loosely, where `HiddenStatesLoss` binds all. The paper trains the layers up to the hint first, by
    itself (`--distill_phases intermediate=N,prediction=M`), and halves and sums the squares where this takes their mean.

    Attributes: as in `HiddenStatesLoss`; a map of one pair names the guided layer and the hint.

    Example:
        >>> HintLoss(LayerMap(((3, 8),))).pairs
        'middle'
    """

    name: ClassVar[str] = "hint"
    projection: ProjectionChoice = "per_layer"
    pairs: Pairs = field(default="middle", kw_only=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.projection != "per_layer":
            raise LossError(
                f"HintLoss has a regressor for each layer, so projection={self.projection!r} does not go with it. Take "
                "HiddenStatesLoss(pairs='middle')."
            )

    @property
    def _projected(self) -> bool:
        return self.widths != (0, 0)

    def _projection_name(self, layer: int) -> str:
        return f"{self.stack}_hint_{layer}"


def compared_pairs(
    student: Stack, teacher: Stack, asked: LayerMap | str | None, which: Pairs, *, first_layer: int = 0
) -> tuple[tuple[int, int], ...]:
    """Some pairs of a layer map, from the bottom to the top.

    Args:
        student, teacher: the stacks.
        asked: a map or its name; with None the last pair is of both models' last layers, whatever dropping left.
        which: of an even number the middle one is the one before the middle.
        first_layer: 1 where layer 0, the embedding output, has nothing to compare.
    """
    if which == "last" and asked is None:
        return ((student.num_layers, teacher.num_layers),)
    pairs = tuple(sorted(pair for pair in student.map_from(asked, teacher).pairs if min(pair) >= first_layer))
    middle = (len(pairs) - 1) // 2
    return {"all": pairs, "last": pairs[-1:], "all_but_last": pairs[:-1] or pairs, "middle": pairs[middle : middle + 1]}[which]


def summary_index(mask: Tensor, last: bool) -> Tensor:
    """Where the token stands that sums an example up.

    Args:
        mask: (batch, tokens) bool, True where a token is real; padding may be on either side.
        last: the last real token rather than the first.

    Returns:
        (batch,) int64.
    """
    positions = torch.arange(mask.shape[-1], device=mask.device).expand_as(mask)
    return torch.where(mask, positions, -1).amax(-1) if last else mask.int().argmax(-1)


def refuse_without_tokens(loss: Loss, student: ModelShape) -> None:
    """A model of images has no tokens to count."""
    if student.main_input != "input_ids":
        raise LossError(
            f"{student.name} reads {student.main_input}, so there are no tokens to count, and {loss.name} counts tokens. "
            "Use the recipe logits, which counts examples."
        )


def refuse_part_of_states(loss: Loss, teacher: Stack, words: str = "") -> None:
    """Some losses need the teacher's states whole."""
    if teacher.selected:
        raise LossError(
            f"The teacher on disk holds part of its hidden states (some tokens, some dimensions), and {loss.name}{words} needs them whole. "
            "Take hidden_states of the kind 'mse' (the recipes mud, layerwise, tinybert), or store everything: --hsk all."
        )


def stacks_in_both(loss: HiddenStatesLoss | Loss, student: ModelShape, teacher: ModelShape) -> list[str]:
    """The stacks a loss compares: the one it names, or all; both models must have them."""
    wanted = getattr(loss, "stack", None)
    names = [wanted] if wanted else list(student.stacks)
    for name in names:
        if name not in student.stacks or name not in teacher.stacks:
            raise LossError(
                f"{type(loss).__name__} compares the stack {name!r}, but the student {student.name} has {', '.join(student.stacks)} "
                f"and the teacher {teacher.name} has {', '.join(teacher.stacks)}."
            )
    return names
