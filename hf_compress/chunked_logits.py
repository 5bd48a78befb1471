"""Language models' predictions compared some tokens at a time, so that no tensor of batch x tokens x vocabulary is ever made.

    student's forward:  layers -> hidden --.--> head --> logits of each row's first token (or of all, where the model's own loss reads them)
                                           |
                   tokens that count:  h_1 ... h_n,  a chunk at a time:
                        head(h) ----.
                                    |--> losses on the logits --> a sum a loss,    on the labels --> a sum
                   teacher's rows --'
                        (of its own hidden states through its own head, or from disk: whole, or the k largest)

All that is summed is made inside the student's forward, and returned in its output, so that DDP, FSDP and ZeRO see it. Where there are
several chunks, each is computed once more in the backward pass (`torch.utils.checkpoint`) and only hidden states are kept in between: what
is in memory at once is some tensors of chunk x vocabulary. Padding is left out before the head, not after it.
"""

from __future__ import annotations

import inspect
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers.loss.loss_utils import ForCausalLMLoss, ForMaskedLMLoss

from hf_compress.errors import LossError
from hf_compress.layers.stack import pretrained_model
from hf_compress.losses.labels import LabelsLoss
from hf_compress.losses.logits import LogitsLoss
from hf_compress.losses.loss import Loss
from hf_compress.losses.reduction import IGNORED_LABEL, Batch, full_precision
from hf_compress.prediction_head import HeadTap, PredictionHead
from hf_compress.signals import Signals
from hf_compress.task import kind_of
from hf_compress.top_logits import TopLogits

logger = logging.getLogger(__name__)

# Smaller vocabularies are compared whole: their logits are no larger than what the layers hold.
LARGE_VOCABULARY = 8192
# Their forward multiplies by parts of the head and never calls it.
_HEAD_NOT_CALLED = frozenset({"mobilebert"})
LABELS_SUM = "labels_sum"
# Numbers in one tensor of chunk x vocabulary, by default: 128 MiB as float32.
CHUNK_NUMBERS = 2**25


@dataclass(frozen=True)
class ChunkSettings:
    """How predictions are compared.

    Attributes:
        chunk_size: tokens a chunk; 0 compares whole logits; None decides by the vocabulary.
        own_label_loss: whether the label loss is the model's own; a `compute_loss_func` or label smoothing reads whole logits.
    """

    chunk_size: int | None = None
    own_label_loss: bool = True

    def tokens(self, student: nn.Module) -> int:
        """Tokens a chunk; 0 where whole logits are compared.

        Raises:
            LossError: chunks are asked for by number, and the student is no causal or masked language model.
        """
        kind = kind_of(student)
        if kind not in ("causal_lm", "masked_lm"):
            if self.chunk_size:
                raise LossError(
                    f"--distill_logits_chunk_size {self.chunk_size} is for causal and masked language models, and the student is a "
                    f"{type(pretrained_model(student)).__name__}: leave it out."
                )
            return 0
        if self.chunk_size is not None:
            return self.chunk_size
        if pretrained_model(student).config.model_type in _HEAD_NOT_CALLED:
            return 0
        vocabulary = int(getattr(pretrained_model(student).config.get_text_config(), "vocab_size", 0) or 0)
        return max(1, CHUNK_NUMBERS // vocabulary) if vocabulary >= LARGE_VOCABULARY else 0


class ChunkedLogits:
    """Computes a language model's logits losses, and the loss on its labels, inside its forward.

    Args:
        student: the plain model.
        losses: the logits losses of this phase, resolved.
        labels: whether the labels count as well.
        chunk_size: tokens a chunk.
        own_label_loss: see `ChunkSettings`.

    Attributes:
        takes_labels: whether the loss on the labels is computed here, so that the student must not be given any.

    Raises:
        LossError: the student's head cannot be called by itself.
    """

    def __init__(
        self, student: nn.Module, losses: Sequence[LogitsLoss], *, labels: bool, chunk_size: int, own_label_loss: bool = True
    ) -> None:
        self.losses, self.chunk_size = tuple(losses), chunk_size
        self.takes_labels = labels and own_label_loss and has_plain_label_loss(student)
        self._causal = kind_of(student) == "causal_lm"
        self._head = PredictionHead(student)
        self._batch: Batch | None = None
        self._teacher = Signals()
        self._sums: Tensor | None = None
        # A script's own further forwards, with which nothing is compared, are left alone.
        skip = self.takes_labels or not labels
        self._tap = HeadTap(student, self._head, self._take, skip=skip, only_in_training=True, wanted=self._is_shown)
        self._handle = student.register_forward_hook(self._finish)
        logger.info("logits are compared %d tokens at a time%s", chunk_size, ", and so are labels" if self.takes_labels else "")

    def remove(self) -> None:
        """Take the hooks off the student."""
        self._tap.remove()
        self._handle.remove()

    def show(self, batch: Batch, teacher: Signals) -> None:
        """What the next forward of the student is compared with."""
        self._batch, self._teacher = batch, teacher

    def total(self, loss: Loss, outputs: Mapping[str, Any]) -> Tensor | None:
        """The sum of a loss over this micro-batch, from the student's output; None if it is computed elsewhere."""
        if isinstance(loss, LabelsLoss):
            return outputs[LABELS_SUM] if self.takes_labels else None
        return outputs[_name(self.losses.index(loss))] if isinstance(loss, LogitsLoss) else None

    def _is_shown(self) -> bool:
        return self._batch is not None

    def _take(self, hidden: Tensor) -> None:
        """(batch, tokens, width) -> the sums of this batch."""
        batch, teacher = self._batch, self._teacher
        assert batch is not None, "show() comes before the student's forward"
        self._batch, self._teacher = None, Signals()
        mask = batch.token_masks[self.losses[0].stack]
        if hidden.shape[:2] != mask.shape:
            raise LossError(
                f"The student's head reads {tuple(hidden.shape)}, and the batch has {tuple(mask.shape)} tokens: they cannot be told apart. "
                "Compare whole logits: --distill_logits_chunk_size 0."
            )
        targets = self._targets(batch, mask) if self.takes_labels else None
        counts = mask if targets is None else mask | (targets != IGNORED_LABEL)
        # Which tokens these are is read from the device, once a micro-batch: that costs less than computing padding's logits.
        places = counts.flatten().nonzero().squeeze(1)
        real = mask.flatten()[places]
        targets = None if targets is None else targets.flatten()[places]
        states = hidden.flatten(0, 1)[places]
        chunks = self._chunks(len(places), teacher, hidden.device)
        sums: list[Tensor] = []
        for start in range(0, chunks * self.chunk_size, self.chunk_size):
            span = slice(start, start + self.chunk_size)
            rows = _Rows(teacher, places[span], real[span], None if targets is None else targets[span])
            if chunks == 1:
                sums.append(self._chunk(states, rows))
            else:
                sums.append(checkpoint(self._chunk, states[span], rows, use_reentrant=False))
        self._sums = torch.stack(sums).sum(0)

    def _chunks(self, tokens: int, teacher: Signals, device: torch.device) -> int:
        """How many chunks so many tokens are, 1 at least; the last may have no tokens."""
        chunks = max(1, -(-tokens // self.chunk_size))
        heads = [shown.head_states for shown in (teacher, *teacher.teachers.values()) if shown.head_states is not None]
        sharded = self._head.sharded or any(head.sharded for head in heads)
        if sharded and torch.distributed.is_initialized():
            # A call of a head of which each process holds a part is a call of all of them.
            most = torch.tensor(chunks, device=device)
            torch.distributed.all_reduce(most, torch.distributed.ReduceOp.MAX)
            chunks = int(most)
        return chunks

    def _targets(self, batch: Batch, mask: Tensor) -> Tensor:
        """(batch, tokens): the label that each token's logits are to predict."""
        labels = batch.labels
        if labels is None:
            raise LossError("The labels have a weight, but the batch has none. Give the data labels, or --distill_weights labels=0.")
        return F.pad(labels[:, 1:], (0, 1), value=IGNORED_LABEL) if self._causal else labels

    def _chunk(self, states: Tensor, rows: _Rows) -> Tensor:
        """(n, width) -> (losses + 1,): the sum of each, the labels' last."""
        logits = full_precision(self._head.logits(states))
        theirs = {number: rows.of_teacher(number) for number in {loss.teacher for loss in self.losses}}
        zero = torch.zeros((), dtype=logits.dtype, device=logits.device)
        sums = [torch.where(rows.real, loss.of_tokens(logits, theirs[loss.teacher]), zero).sum() for loss in self.losses]
        labels = zero if rows.targets is None else F.cross_entropy(logits, rows.targets, ignore_index=IGNORED_LABEL, reduction="sum")
        return torch.stack([*sums, labels])

    def _finish(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        if self._sums is None:
            return None
        sums, self._sums = self._sums.unbind(), None
        found = {_name(number): value for number, value in enumerate(sums[:-1])}
        return {**output, **found, **({LABELS_SUM: sums[-1]} if self.takes_labels else {})}


@dataclass(frozen=True)
class _Rows:
    """The teacher's side of a chunk.

    Attributes:
        teacher: what it shows of the batch.
        places: (n,) which tokens these are, counted over the batch.
        real: (n,) bool, where the teacher is compared.
        targets: (n,) the labels to predict; None where they do not count.
    """

    teacher: Signals
    places: Tensor
    real: Tensor
    targets: Tensor | None

    def of_teacher(self, number: int | None) -> Tensor | TopLogits:
        """(n, vocabulary), or what is kept of it; see `Signals.of_teacher`."""
        teacher = self.teacher.of_teacher(number)
        if teacher.top_logits is not None:
            return teacher.top_logits.at(self.places)
        if teacher.head_states is not None:
            return teacher.head_states.logits(teacher.head_states.states.flatten(0, 1)[self.places])
        return teacher.logits["logits"].flatten(0, 1)[self.places]


def has_plain_label_loss(model: nn.Module) -> bool:
    """Whether a language model's own loss is the cross-entropy of its labels, shifted in a causal one, and nothing besides."""
    owner = pretrained_model(model)
    if getattr(owner.config.get_text_config(), "output_router_logits", False):
        return False  # experts have a loss of their own
    own: Any = getattr(owner, "loss_function", None)
    if not type(owner).forward.__module__.startswith(("transformers.models.", "hf_compress.")):
        return False  # somebody's own forward may do anything with it
    if kind_of(model) == "masked_lm":
        return own in (None, ForMaskedLMLoss, ForCausalLMLoss)
    return own is ForCausalLMLoss and "loss_function" in inspect.unwrap(type(owner).forward).__code__.co_names


def _name(number: int) -> str:
    return f"logits_sum.{number}"
