"""The one place for padding, counts and means.

A loss is a sum over units (examples, real tokens, labels) divided by how many units the whole optimizer step has: all its micro-batches
on all its processes. A mean of means would weigh an example by how full its micro-batch happens to be; this way 1 x 16, 2 x 8 on two
processes and 2 x 8 accumulated give the same gradient.

A unit is named by a string: "examples", "labels", "tokens.STACK" for the real tokens of that stack of layers, "selected.STACK" for those of
them that a teacher on disk has states of, or "rows.STACK" for its rows: the examples, or each of their choices in multiple choice.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from hf_compress.errors import DataError
from hf_compress.task import TOKEN_KINDS, Kind

EXAMPLES = "examples"
LABELS = "labels"
IGNORED_LABEL = -100


def tokens_of(stack: str) -> str:
    """The unit "real tokens of this stack"."""
    return f"tokens.{stack}"


def rows_of(stack: str) -> str:
    """The unit "rows of this stack": examples, or choices of examples."""
    return f"rows.{stack}"


def selected_of(stack: str) -> str:
    """The unit "selected tokens of this stack"."""
    return f"selected.{stack}"


@dataclass(frozen=True)
class Batch:
    """What losses and counts need to know of a batch beside the signals.

    Attributes:
        num_examples: how many examples it has.
        token_masks: by stack, (batch, tokens) bool, True where a token is real; choices of multiple choice count as batch.
        label_mask: True where a label counts: (batch, tokens) for token tasks, shifted for causal ones; (batch,) otherwise.
        separators: (batch, tokens) bool, True at separator tokens; only where a loss needs it.
        causal_stacks: the stacks in which a token sees no later one.
        summary_last: the stacks whose last real token sums an example up, not the first.
        labels: as the model gets them.
        selected: by stack, (batch, selected) bool, True where a teacher on disk has a token's state.
    """

    kind: Kind
    num_examples: int
    token_masks: Mapping[str, Tensor]
    label_mask: Tensor | None = None
    separators: Tensor | None = None
    causal_stacks: frozenset[str] = frozenset()
    summary_last: frozenset[str] = frozenset()
    labels: Tensor | None = None
    selected: Mapping[str, Tensor] = field(default_factory=dict)
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))

    def count(self, unit: str) -> Tensor:
        """How many units of this kind the batch has, as a float tensor on the batch's device: no value is read back."""
        if unit == EXAMPLES:
            return torch.full((), float(self.num_examples), device=self.device)
        if unit == LABELS:
            if self.label_mask is None:
                raise DataError("A loss needs labels, but the batch has none. Name the label column label, labels or in --label_names.")
            return self.label_mask.sum().float()
        kind, _, stack = unit.partition(".")
        if kind == "selected":
            return self.selected[stack].sum().float()
        if stack not in self.token_masks:
            raise DataError(
                f"A loss counts the real tokens of the {stack}, but the batch has neither attention_mask nor input_ids for it. "
                "Use the logits losses, which count examples."
            )
        mask = self.token_masks[stack]
        return torch.full((), float(len(mask)), device=self.device) if kind == "rows" else mask.sum().float()


@dataclass(frozen=True)
class BatchReader:
    """Makes a `Batch` of a model's inputs.

    Args:
        kind: what the model is for.
        stacks: the names of its stacks of layers.
        pad_token_id, eos_token_id: of the tokenizer, for batches that come without a mask.
        separator_ids: token ids that count as separators.
        causal_stacks: the stacks in which a token sees no later one.
        summary_last: the stacks whose last real token sums an example up: causal ones, and XLNet's.
        label_name: the column that holds the labels.
        needs_tokens: whether a loss looks at tokens; if not, padding need not be told from text.
    """

    kind: Kind
    stacks: tuple[str, ...]
    pad_token_id: int | None = None
    eos_token_id: int | None = None
    separator_ids: tuple[int, ...] = ()
    causal_stacks: frozenset[str] = frozenset()
    summary_last: frozenset[str] = frozenset()
    label_name: str = "labels"
    needs_tokens: bool = True

    def read(self, inputs: Mapping[str, Any], selected: Mapping[str, Tensor] | None = None) -> Batch:
        """Read masks and labels; nothing is copied from the device.

        Args:
            inputs: as the model gets them, labels included.
            selected: see `Batch`.

        Raises:
            DataError: if real tokens cannot be told from padding.
        """
        tensors = {name: value for name, value in inputs.items() if isinstance(value, Tensor)}
        if not tensors:
            raise DataError(f"The batch holds no tensor; its columns are {', '.join(inputs) or 'none'}.")
        leading = tensors.get("input_ids", next(iter(tensors.values())))
        masks: dict[str, Tensor] = {}
        first, *rest = self.stacks
        if self.needs_tokens and (mask := self._input_mask(tensors)) is not None:
            masks[first] = mask.reshape(-1, mask.shape[-1])
        labels = tensors.get(self.label_name)
        for stack in rest if self.needs_tokens else ():  # the decoder of an encoder-decoder model
            if (decoder := self._decoder_mask(tensors, masks.get(first))) is not None:
                masks[stack] = decoder
        separators = None
        if self.separator_ids and "input_ids" in tensors:
            ids = tensors["input_ids"].reshape(-1, tensors["input_ids"].shape[-1])
            separators = torch.isin(ids, torch.tensor(self.separator_ids, device=ids.device))
        return Batch(
            kind=self.kind,
            num_examples=leading.shape[0],
            token_masks=masks,
            label_mask=self._label_mask(tensors, leading.shape[0]),
            separators=separators,
            causal_stacks=self.causal_stacks,
            summary_last=self.summary_last,
            labels=labels,
            selected=selected or {},
            device=leading.device,
        )

    def _input_mask(self, tensors: Mapping[str, Tensor]) -> Tensor | None:
        mask = tensors.get("attention_mask")
        if mask is not None and mask.dim() in (2, 3) and (mask.dim() == 2 or self.kind == "multiple_choice"):
            return mask.bool()
        ids = tensors.get("input_ids")
        if ids is None:
            return None
        if mask is not None or "position_ids" in tensors or "cu_seq_lens_q" in tensors:
            raise DataError(
                "The batch is packed: several examples share a row, so they cannot be told apart. "
                "Use a collator that pads (DataCollatorWithPadding) instead."
            )
        if self.pad_token_id is None or self.pad_token_id == self.eos_token_id:
            raise DataError(
                "The batch has no attention_mask, and the tokenizer has no padding token of its own, so padding cannot be told "
                "from text. Keep attention_mask in the batch, or give the tokenizer a pad_token that is not its eos_token."
            )
        return ids != self.pad_token_id

    def _decoder_mask(self, tensors: Mapping[str, Tensor], inputs: Tensor | None) -> Tensor | None:
        if "decoder_attention_mask" in tensors:
            return tensors["decoder_attention_mask"].bool()
        if self.kind == "seq2seq_lm" and self.label_name in tensors:
            return tensors[self.label_name] != IGNORED_LABEL
        if "decoder_input_ids" not in tensors:
            return inputs  # a classifier's decoder reads the input once more
        if "decoder_input_ids" in tensors and self.pad_token_id is not None:
            ids = tensors["decoder_input_ids"]
            real = ids != self.pad_token_id
            real[:, 0] = True  # decoders often start with the padding token
            return real
        return None

    def _label_mask(self, tensors: Mapping[str, Tensor], num_examples: int) -> Tensor | None:
        if self.kind == "question_answering":
            start = tensors.get("start_positions")
            return None if start is None else torch.ones(num_examples, dtype=torch.bool, device=start.device)
        labels = tensors.get(self.label_name)
        if labels is None:
            return None
        if self.kind == "causal_lm":
            return labels[:, 1:] != IGNORED_LABEL  # token t is predicted from the tokens before it
        if self.kind in TOKEN_KINDS or self.kind == "seq2seq_lm" or (labels.dim() == 1 and not labels.is_floating_point()):
            return labels != IGNORED_LABEL
        return torch.ones(num_examples, dtype=torch.bool, device=labels.device)


def masked_sum(values: Tensor, mask: Tensor) -> Tensor:
    """Sum `values` where `mask` is True.

    Args:
        values: (batch, tokens); what stands at padding may be anything: it is replaced, not multiplied by 0. (Where it may be NaN, mask
            what it was computed from as well: the gradient of a NaN is NaN.)
        mask: (batch, tokens) bool.
    """
    return torch.where(mask, values, torch.zeros((), dtype=values.dtype, device=values.device)).sum()


def full_precision(values: Tensor) -> Tensor:
    """Half precision as float32, since squares and sums of it overflow; float32 and float64 as they are."""
    return values if values.dtype in (torch.float32, torch.float64) else values.float()


class _SquaredError(torch.autograd.Function):
    """Half the passes over the largest tensors of a step that subtracting, squaring, masking and summing one by one would take."""

    @staticmethod
    def forward(ctx: Any, student: Tensor, teacher: Tensor, mask: Tensor) -> Tensor:
        # Replaced, not multiplied by 0: the teacher may show NaN at padding.
        difference = (student - teacher).masked_fill_(~mask[..., None], 0.0)
        ctx.save_for_backward(difference)
        flat = difference.reshape(-1)
        return flat.dot(flat)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        (difference,) = ctx.saved_tensors
        return difference * (2 * gradient), None, None


def squared_error(student: Tensor, teacher: Tensor, mask: Tensor) -> Tensor:
    """Sum of (student - teacher)^2 over real tokens and all dimensions.

    Args:
        student, teacher: (batch, tokens, hidden); the teacher's has no gradient.
        mask: (batch, tokens) bool, True where a token is real.

    Returns:
        A scalar.
    """
    apply: Callable[..., Tensor] = _SquaredError.apply
    return apply(student, teacher.detach(), mask)


def visible_keys(real: Tensor, *, causal: bool) -> Tensor:
    """Which keys each query may see: (batch, tokens) bool, True where a token is real -> (batch, 1, queries, keys) bool."""
    visible = real[:, None, :] & real[:, :, None]
    if causal:
        visible = visible & torch.ones_like(visible[0]).tril()
    return visible[:, None]


class _Divergence(torch.autograd.Function):
    """The gradient of a softmax's cross-entropy is the difference of two distributions: one tensor is kept, not five."""

    @staticmethod
    def forward(ctx: Any, student: Tensor, teacher: Tensor, visible: Tensor) -> Tensor:
        hidden, lowest = ~visible, torch.finfo(student.dtype).min  # no infinity: a query that sees nothing would be NaN
        log_student = student.masked_fill(hidden, lowest).log_softmax(-1)
        log_teacher = teacher.to(student.dtype).masked_fill(hidden, lowest).log_softmax(-1)
        probabilities = log_teacher.exp()
        value = log_teacher.sub_(log_student).mul_(probabilities).sum(-1)
        ctx.save_for_backward(log_student.exp_().sub_(probabilities))
        return value

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        (difference,) = ctx.saved_tensors
        return difference * gradient[..., None], None, None


def divergence(student: Tensor, teacher: Tensor, visible: Tensor) -> Tensor:
    """KL(softmax(teacher) || softmax(student)) over the keys that a query may see.

    Args:
        student, teacher: (batch, heads, queries, keys), before mask and softmax; the teacher's has no gradient.
        visible: see `visible_keys`.

    Returns:
        (batch, heads, queries); 0 for a query that sees nothing.
    """
    apply: Callable[..., Tensor] = _Divergence.apply
    return apply(student, teacher.detach(), visible)
