"""Several teachers as one `SignalSource`, and what sets one teacher's part of a student apart from another's.

        sum_k w_k L(student, teacher k),   w_k >= 0, sum_k w_k = 1

Every loss is computed against each teacher by itself, and the sum is weighted. For predictions that is the same as learning from the
mixture of the teachers' (softened) probabilities, since

        sum_k w_k KL(p_k || q)  =  KL(sum_k w_k p_k || q)  +  what does not hang on the student

so the gradient is equal; and it needs no teacher to be as deep or as wide as another, or to be asked at the same time. For mean squared
errors the same holds of the teachers' mean state.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from typing import Any

from torch import Tensor

from hf_compress.cached_teacher import ENTRY, CachedTeacher
from hf_compress.losses.loss import Loss, Projection
from hf_compress.signals import HiddenState, Signals, SignalSource, SignalSpec


class SeveralTeachers:
    """Teachers that are asked one after another, live or from disk.

    Args:
        members: by the number that the user counts them by.
    """

    def __init__(self, members: Mapping[int, SignalSource]) -> None:
        self.members = dict(members)
        self.columns = frozenset[str]().union(*(getattr(member, "columns", frozenset()) for member in self.members.values()))
        for number, member in self.members.items():
            if isinstance(member, CachedTeacher):
                member.entry = f"{ENTRY}_{number}"

    def signals(self, inputs: Mapping[str, Tensor], spec: SignalSpec) -> Signals:
        """What each teacher shows of that which is asked of it."""
        return Signals(teachers={number: self.members[number].signals(inputs, asked) for number, asked in spec.teachers.items()})

    def close(self) -> None:
        """Let go of what they hold."""
        for member in self.members.values():
            member.close()


def members_of(source: SignalSource | None) -> dict[int | None, SignalSource]:
    """Each teacher by its number; None stands for the only one."""
    if isinstance(source, SeveralTeachers):
        return {number: member for number, member in source.members.items()}
    return {} if source is None else {None: source}


def stored_members(source: SignalSource | None) -> dict[int | None, CachedTeacher]:
    """The teachers among them that are on disk."""
    return {number: member for number, member in members_of(source).items() if isinstance(member, CachedTeacher)}


def reading_all(source: SignalSource | None, collator: Callable[[list[Any]], Any], spec: SignalSpec) -> Callable[[list[Any]], Any]:
    """A collator that adds to each batch what the teachers on disk say of it; the same collator where there are none.

    Args:
        source: of the run.
        collator: makes the batches.
        spec: what is asked.
    """
    for number, member in stored_members(source).items():
        if number is None or number in spec.teachers:
            collator = member.reading(collator, spec.of_teacher(number))
    return collator


def before_the_head(spec: SignalSpec, numbers: Iterable[int | None]) -> SignalSpec:
    """What is asked, with what the head reads in place of whole logits, of the teachers of these numbers; None is the only one."""
    wanted = set(numbers)
    if None in wanted:
        return replace(spec, logits=False, head_states=True) if spec.logits else spec
    asked = {each: before_the_head(own, [None]) if each in wanted else own for each, own in spec.teachers.items()}
    return replace(spec, teachers=asked)


# --- the student's side: what a loss of one teacher calls X is the student's X for that teacher ---


def asked_of_teacher(loss: Loss) -> SignalSpec:
    """What a loss asks for, of its teacher."""
    spec = loss.teacher_spec()
    return spec if loss.teacher is None or spec == SignalSpec() else SignalSpec(teachers={loss.teacher: spec})


def asked_of_student(loss: Loss) -> SignalSpec:
    """What a loss asks the student for: its states through the maps that are of this teacher, at the tokens that it has."""
    spec = loss.student_spec()
    if loss.teacher is None:
        return spec
    return replace(spec, hidden_states=frozenset(_for_teacher(key, loss.teacher) for key in spec.hidden_states))


def shown_to(loss: Loss, student: Signals) -> Signals:
    """The student's signals by the names that the loss has for them."""
    if loss.teacher is None:
        return student
    asked = loss.student_spec().hidden_states
    return replace(student, hidden_states={key: student.hidden_states[_for_teacher(key, loss.teacher)] for key in asked})


def projections_of(loss: Loss) -> dict[str, Projection]:
    """The learnt maps of a loss; each teacher has its own."""
    return {_projection(name, loss.teacher): size for name, size in loss.projections.items()}


def unit_of(loss: Loss) -> str:
    """What a loss sums over; the selected tokens of one teacher are not those of another."""
    return loss.unit if loss.teacher is None or not loss.unit.startswith("selected.") else f"{loss.unit}.{loss.teacher}"


def chosen_tokens(teacher: Signals) -> dict[str, Tensor]:
    """By the names that `unit_of` gives, without "selected.": which selected tokens count, (batch, selected) bool."""
    # Every layer of a stack has as many tokens of an example: the count is one.
    chosen = {key.stack: state.chosen for key, state in teacher.selected_states.items()}
    for number, each in teacher.teachers.items():
        chosen |= {f"{stack}.{number}": tokens for stack, tokens in chosen_tokens(each).items()}
    return chosen


def positions_in(teacher: Signals, number: int | None = None) -> dict[tuple[int | None, str, int], Tensor]:
    """Where the teachers on disk have states, by teacher, stack and layer; see `Capture`."""
    found = {(number, key.stack, key.layer): state.positions for key, state in teacher.selected_states.items()}
    for each, signals in teacher.teachers.items():
        found |= positions_in(signals, each)
    return found


def _for_teacher(key: HiddenState, number: int) -> HiddenState:
    projection = _projection(key.projection, number) if key.projection else ""
    return replace(key, projection=projection, teacher=None if key.taught_by is None else number)


def _projection(name: str, number: int | None) -> str:
    return name if number is None else f"teacher_{number}_{name}"
