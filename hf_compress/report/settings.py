"""How large the demo is, and the models that it makes."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from hf_compress.errors import ArgumentError
from hf_compress.report.training import Schedule


@dataclass(frozen=True)
class DemoSettings:
    """Sizes of the demo; what it claims was measured with these.

    Attributes:
        teacher_examples: labelled examples that the teacher learns from; the bag of words gets the same.
        student_examples: others, that each student learns from.
        test_examples: others again, for all.
        wrong_labels: share of the labels of the students' examples that are turned round; all others are right.
        teacher_schedule: of the teacher.
        student_schedule: of each student, with labels and distilled.
        temperature: of the logits in distillation.
        num_hidden_layers: of the teacher, as the four that follow.
        hidden_size: width.
        intermediate_size: of the feed-forward part.
        num_attention_heads: of the narrow student too.
        initializer_range: standard deviation of random weights. BERT's 0.02 is for a width of 768 and stalls so narrow a model.
        narrow_layers: of the narrow student, as the two that follow.
        narrow_hidden_size: width.
        narrow_intermediate_size: of the feed-forward part.
        stored: which of the hidden states are stored for the student that learns from disk.
        layers_to_keep: of the teacher, in the other student, counted from 1.
    """

    teacher_examples: int = 24_000
    student_examples: int = 500
    test_examples: int = 2_000
    wrong_labels: float = 0.2
    teacher_schedule: Schedule = field(default_factory=lambda: Schedule(steps=1100, batch_size=32, learning_rate=7e-4))
    student_schedule: Schedule = field(default_factory=lambda: Schedule(steps=400, batch_size=32, learning_rate=2e-3))
    temperature: float = 2.0
    num_hidden_layers: int = 6
    hidden_size: int = 96
    intermediate_size: int = 192
    num_attention_heads: int = 4
    initializer_range: float = 0.05
    narrow_layers: int = 3
    narrow_hidden_size: int = 48
    narrow_intermediate_size: int = 96
    layers_to_keep: tuple[int, ...] = (2, 4)
    stored: str = "10t_0.25h"

    def scaled(self, scale: float) -> DemoSettings:
        """The same demo with that share of the examples and steps, for a look or a test.

        Raises:
            ArgumentError: the scale is not above 0 and at most 1.
        """
        if not 0 < scale <= 1:
            raise ArgumentError(f"The scale of the demo is {scale}; it must be above 0 and at most 1, which is the whole demo.")
        if scale == 1:
            return self

        def shorter(schedule: Schedule) -> Schedule:
            return replace(schedule, steps=max(2, round(scale * schedule.steps)))

        return replace(
            self,
            teacher_examples=max(200, round(scale * self.teacher_examples)),
            student_examples=max(100, round(scale * self.student_examples)),
            test_examples=max(100, round(scale * self.test_examples)),
            teacher_schedule=shorter(self.teacher_schedule),
            student_schedule=shorter(self.student_schedule),
        )
