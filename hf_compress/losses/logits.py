"""Softened predictions: what the teacher believes, also about the wrong answers."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from hf_compress.errors import LossError
from hf_compress.losses.loss import Loss, Phase
from hf_compress.losses.reduction import EXAMPLES, LABELS, Batch, full_precision, masked_sum, tokens_of
from hf_compress.signals import Signals, SignalSpec
from hf_compress.task import Kind, ModelShape
from hf_compress.top_logits import TopLogits

LogitsKind = Literal["kl", "soft_cross_entropy", "mse"]
Outputs = Literal["classes", "several_labels", "numbers"]
# What a config says of its head; where it says nothing, the labels tell.
_PROBLEMS: dict[str | None, Outputs] = {
    "single_label_classification": "classes",
    "multi_label_classification": "several_labels",
    "regression": "numbers",
}
LANGUAGE_MODELS: tuple[Kind, ...] = ("causal_lm", "masked_lm", "seq2seq_lm")


@dataclass(frozen=True)
class LogitsLoss(Loss):
    """Compare the student's predictions with the teacher's.

        kl                  T^2 * sum_c p_T(c) * (log p_T(c) - log p_S(c)),  p = softmax(z / T)     Hinton et al. 1503.02531
        soft_cross_entropy  -sum_c p_T(c) * log p_S(c)                                              TinyBERT 1909.10351, eq. 10
        mse                 mean_c (z_S(c) - z_T(c))^2

    summed over examples; over labelled tokens in token classification; over real tokens in language models. Several labels at once
    (multi-label) are compared one by one as Bernoulli distributions and averaged over the labels; a single number (regression) by its
    squared error, whatever `kind` says. Question answering averages the comparison of starts and of ends over the real tokens.

    Where a teacher on disk has only a token's k largest logits, the classes are k + 1 events: each of the k words, and "another word",
    whose probability is the sum of all others', on both sides. With k = V that is the sum above; with fewer, `kl` is never larger than it.

    T^2 keeps the gradient's size when T changes. `kl` and `soft_cross_entropy` have the same gradient at T = 1; `kl` is 0 where the
    student equals the teacher, so its value can be read.

    Attributes:
        temperature: T, above 0.
        kind: see above.
        weight: see `Loss`.

    Example:
        >>> LogitsLoss(temperature=2.0, weight=0.5).unit
        'examples'
    """

    name: ClassVar[str] = "logits"
    phase: ClassVar[Phase] = "prediction"
    temperature: float = 2.0
    kind: LogitsKind = "kl"
    task: Kind = field(default="sequence_classification", kw_only=True)  # filled in by resolve()
    stack: str = field(default="", kw_only=True)
    outputs: Outputs | None = field(default=None, kw_only=True)

    def __post_init__(self) -> None:
        if self.temperature <= 0:
            raise LossError(f"The temperature is {self.temperature}; it must be above 0. 1 is plain probabilities, 2 to 10 soften them.")
        if self.kind not in ("kl", "soft_cross_entropy", "mse"):
            raise LossError(f"LogitsLoss has no kind {self.kind!r}; it has 'kl', 'soft_cross_entropy' and 'mse'.")

    def __str__(self) -> str:
        return f"{super().__str__()} ({self.kind}, T = {self.temperature:g})"

    def resolve(self, student: ModelShape, teacher: ModelShape) -> tuple[Loss, ...]:
        """Learn what an example is from the student's head."""
        if student.kind != teacher.kind:
            raise LossError(
                f"The student is a {student.name} and the teacher a {teacher.name}: their predictions mean different things. "
                "Load the teacher with the student's kind of head, or leave the logits out (--distill_weights logits=0)."
            )
        if None not in (student.problem_type, teacher.problem_type) and student.problem_type != teacher.problem_type:
            raise LossError(
                f"The student's config says problem_type={student.problem_type!r}, the teacher's {teacher.problem_type!r}: their "
                "predictions mean different things. Take a teacher that was fine-tuned on this task, or leave the logits out "
                "(--distill_weights logits=0)."
            )
        if teacher.top_logits and self.kind == "mse":
            raise LossError(
                f"The teacher on disk has the {teacher.top_logits} largest logits of each token, and LogitsLoss(kind='mse') compares all "
                "of them. Take 'kl' or 'soft_cross_entropy', or store them whole (no --teacher_cache_logits_top_k)."
            )
        problem = student.problem_type or teacher.problem_type  # models write it into their config when they see the first labels
        return (replace(self, task=student.kind, stack=tuple(student.stacks)[-1], outputs=_PROBLEMS.get(problem)),)

    @property
    def unit(self) -> str:
        """Examples; labelled tokens; real tokens."""
        if self.task == "token_classification":
            return LABELS
        return tokens_of(self.stack) if self.task in LANGUAGE_MODELS else EXAMPLES

    def student_spec(self) -> SignalSpec:
        """The logits."""
        return SignalSpec(logits=True)

    def teacher_spec(self) -> SignalSpec:
        """The logits."""
        return SignalSpec(logits=True, temperatures=frozenset({float(self.temperature)}))

    def __call__(self, student: Signals, teacher: Signals, batch: Batch) -> Tensor:
        """Sum over the units of the batch."""
        if self.task == "question_answering":
            mask = next(iter(batch.token_masks.values()))
            ends = [self._spans(student.logits[name], teacher.logits[name], mask) for name in ("start_logits", "end_logits")]
            return torch.stack(ends).mean(0).sum()
        if teacher.top_logits is not None:
            return masked_sum(self.of_tokens(student.logits["logits"], teacher.top_logits), batch.token_masks[self.stack])
        values = self._values(full_precision(student.logits["logits"]), full_precision(teacher.logits["logits"]), batch)
        if self.task == "token_classification":
            if batch.label_mask is None:
                raise LossError("Token classification compares predictions at labelled tokens, but the batch has no labels.")
            return masked_sum(values, batch.label_mask)
        if self.task in LANGUAGE_MODELS:
            return masked_sum(values, batch.token_masks[self.stack])
        if values.dim() != 1:
            raise LossError(
                f"The logits are {tuple(student.logits['logits'].shape)}, from a head of kind {self.task!r}: which of them are padding "
                "is not known. Compare hidden states instead (--distill_weights logits=0,hidden_states=10)."
            )
        return values.sum()

    def of_tokens(self, student: Tensor, teacher: Tensor | TopLogits) -> Tensor:
        """The comparison of a language model's tokens: (..., vocabulary), and the teacher's or what is kept of it, -> (...)."""
        student = full_precision(student)
        words = teacher.vocabulary if isinstance(teacher, TopLogits) else teacher.shape[-1]
        if student.shape[-1] != words:
            raise LossError(f"The student's logits are of {student.shape[-1]} words and the teacher's of {words}: other vocabularies.")
        if isinstance(teacher, TopLogits):
            teacher = teacher.moved(lambda tensor: full_precision(tensor) if tensor.is_floating_point() else tensor)
            return self._classes(teacher.events_of(student, self.temperature), teacher.events(self.temperature))
        teacher = full_precision(teacher)
        if self.kind == "mse":
            return (student - teacher).pow(2).mean(-1)
        return self._classes(student / self.temperature, teacher / self.temperature)

    def _values(self, student: Tensor, teacher: Tensor, batch: Batch) -> Tensor:
        """(..., classes) twice -> (...): one value an example or token."""
        if student.shape != teacher.shape:
            raise LossError(
                f"The student's logits are {tuple(student.shape)} and the teacher's {tuple(teacher.shape)}: other labels or another length."
            )
        outputs = self.outputs or self._outputs_of(student, batch)
        if self.kind == "mse" or outputs == "numbers":
            return (student - teacher).pow(2).mean(-1)
        if outputs == "several_labels":
            return self._several_labels(student / self.temperature, teacher / self.temperature)
        return self._classes(student / self.temperature, teacher / self.temperature)

    def _outputs_of(self, logits: Tensor, batch: Batch) -> Outputs:
        if self.task != "sequence_classification":
            return "classes"
        if logits.shape[-1] == 1:
            return "numbers"
        return "several_labels" if batch.labels is not None and batch.labels.is_floating_point() else "classes"

    def _classes(self, student: Tensor, teacher: Tensor) -> Tensor:
        log_student = F.log_softmax(student, -1)
        if self.kind == "soft_cross_entropy":
            return -(F.softmax(teacher, -1) * log_student).sum(-1)
        return F.kl_div(log_student, F.log_softmax(teacher, -1), reduction="none", log_target=True).sum(-1) * self.temperature**2

    def _several_labels(self, student: Tensor, teacher: Tensor) -> Tensor:
        cross_entropy = F.binary_cross_entropy_with_logits(student, teacher.sigmoid(), reduction="none")
        if self.kind == "soft_cross_entropy":
            return cross_entropy.mean(-1)
        entropy = F.binary_cross_entropy_with_logits(teacher, teacher.sigmoid(), reduction="none")
        return (cross_entropy - entropy).mean(-1) * self.temperature**2

    def _spans(self, student: Tensor, teacher: Tensor, mask: Tensor) -> Tensor:
        """(batch, tokens) twice -> (batch,): padding is no place to start or end."""
        student, teacher = full_precision(student), full_precision(teacher)
        if self.kind == "mse":
            zero = torch.zeros((), device=student.device, dtype=student.dtype)
            return torch.where(mask, (student - teacher).pow(2), zero).sum(-1) / mask.sum(-1)
        lowest = torch.finfo(torch.float32).min / max(1.0, self.temperature**2) / 4  # no infinity: 0 * inf is NaN
        far = torch.full((), lowest, device=student.device, dtype=student.dtype)
        return self._classes(torch.where(mask, student / self.temperature, far), torch.where(mask, teacher / self.temperature, far))
