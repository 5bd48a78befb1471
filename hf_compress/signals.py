"""What a model shows for a batch, and what a loss asks to see.

        SignalSpec  --asks-->  SignalSource  --gives-->  Signals
    (logits? which hidden      (the student, a live      (tensors, keyed by what
     states? which scores?)     teacher, a stored one)    the spec asked for)

A loss compares the student's `Signals` with the teacher's. It never touches a model, so it cannot tell whether the teacher was computed
a moment ago or read from disk.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Literal, Protocol, get_args

import torch
from torch import Tensor

from hf_compress.selected_state import SelectedState
from hf_compress.top_logits import TopLogits


@dataclass(frozen=True, order=True)
class HiddenState:
    """The raw output of one layer, before any final norm.

    Attributes:
        stack: "layers" where a model has one stack, else "encoder" or "decoder".
        layer: counted from 1; 0 is what enters layer 1, the embedding output.
        projection: the name of the learnt map that the student's state goes through first; "" for none.
        taught_by: the teacher's layer at whose selected tokens the student's state is taken; None for all tokens.
        teacher: of several, the teacher that `taught_by` speaks of; None for the only one.
    """

    stack: str
    layer: int
    projection: str = ""
    taught_by: int | None = None
    teacher: int | None = None

    @property
    def name(self) -> str:
        """A flat name, for a dictionary of tensors: `hidden_states.layers.3.fit`."""
        at = "" if self.taught_by is None else f".at.{self.taught_by}"
        at += "" if self.teacher is None else f".of.{self.teacher}"
        return f"hidden_states.{self.stack}.{self.layer}.{self.projection}{at}"


@dataclass(frozen=True, order=True)
class AttentionScores:
    """The self-attention scores of one layer, what the softmax gets but for the mask: QK^T/sqrt(d), in T5 unscaled and with its bias of
    relative positions. Layers count from 1.
    """

    stack: str
    layer: int

    @property
    def name(self) -> str:
        """A flat name, for a dictionary of tensors: `attention_scores.layers.3`."""
        return f"attention_scores.{self.stack}.{self.layer}"


# What attention is computed of.
VectorKind = Literal["queries", "keys", "values"]
VECTOR_KINDS: tuple[VectorKind, ...] = get_args(VectorKind)


@dataclass(frozen=True, order=True)
class AttentionVectors:
    """The queries, keys or values of one layer's self-attention, as attention gets them: after rotation and norms.

    Layers count from 1. Grouped-query attention has fewer heads of keys and values than of queries.
    """

    stack: str
    layer: int
    kind: VectorKind

    @property
    def name(self) -> str:
        """A flat name, for a dictionary of tensors: `attention_vectors.layers.3.values`."""
        return f"attention_vectors.{self.stack}.{self.layer}.{self.kind}"


Signal = HiddenState | AttentionScores | AttentionVectors


@dataclass(frozen=True)
class SignalSpec:
    """What is asked for; specs are joined with `|`.

    Attributes:
        logits: the predictions.
        temperatures: at which they are compared; a teacher on disk may hold parts of them that are of one temperature.
        head_states: in place of a language model's logits, what its head reads, of which they are made where they are needed.
        teachers: where there are several, what is asked of each, by its number; nothing else is asked then.
    """

    logits: bool = False
    hidden_states: frozenset[HiddenState] = frozenset()
    attention_scores: frozenset[AttentionScores] = frozenset()
    attention_vectors: frozenset[AttentionVectors] = frozenset()
    temperatures: frozenset[float] = frozenset()
    head_states: bool = False
    teachers: Mapping[int, SignalSpec] = field(default_factory=dict, hash=False)

    def __or__(self, other: SignalSpec) -> SignalSpec:
        return SignalSpec(
            self.logits or other.logits,
            self.hidden_states | other.hidden_states,
            self.attention_scores | other.attention_scores,
            self.attention_vectors | other.attention_vectors,
            self.temperatures | other.temperatures,
            self.head_states or other.head_states,
            {number: self.of_teacher(number) | other.of_teacher(number) for number in sorted({*self.teachers, *other.teachers})},
        )

    def of_teacher(self, number: int | None) -> SignalSpec:
        """What is asked of one of several teachers; of the only one where `number` is None."""
        return self if number is None else self.teachers.get(number, SignalSpec())

    @property
    def stacks(self) -> frozenset[str]:
        """The stacks that any part of the spec looks into."""
        return frozenset(key.stack for key in self.keys)

    @property
    def keys(self) -> frozenset[Signal]:
        """All that is asked of one model but the logits."""
        return frozenset[Signal]().union(self.hidden_states, self.attention_scores, self.attention_vectors)


# The names under which models return logits.
LOGITS = ("logits", "start_logits", "end_logits")


@dataclass(frozen=True)
class HeadStates:
    """What a language model's head reads, and the head.

    Attributes:
        states: (batch, tokens, width).
        logits: (n, width) -> (n, vocabulary), without gradients.
        sharded: whether each process holds a part of the head, so that all must call it equally often.
    """

    states: Tensor
    logits: Callable[[Tensor], Tensor]
    sharded: bool = False


@dataclass
class Signals:
    """What one model showed for one batch.

    Attributes:
        logits: by the name the model gives them, (batch, classes) or (batch, tokens, classes); question answering has
            `start_logits` and `end_logits`, (batch, tokens).
        top_logits: what a teacher on disk has in place of a language model's whole logits.
        head_states: what a live language model shows in their place, if it is asked to.
        hidden_states: (batch, tokens, hidden), or (batch, tokens, teacher's hidden) behind a projection; the student's (batch,
            selected, hidden) where the teacher has only part of its states.
        selected_states: what a teacher on disk has in place of whole hidden states.
        attention_scores: (batch, heads, queries, keys).
        attention_vectors: (batch, heads, tokens, head width).
        scales: (batch, tokens) of hidden states that are whole numbers still, as a teacher on disk has them in int8: `decoded` multiplies.
        teachers: what each of several teachers showed, by its number; all the rest is empty then.
    """

    logits: dict[str, Tensor] = field(default_factory=dict)
    hidden_states: dict[HiddenState, Tensor] = field(default_factory=dict)
    selected_states: dict[HiddenState, SelectedState] = field(default_factory=dict)
    attention_scores: dict[AttentionScores, Tensor] = field(default_factory=dict)
    attention_vectors: dict[AttentionVectors, Tensor] = field(default_factory=dict)
    scales: dict[HiddenState, Tensor] = field(default_factory=dict)
    top_logits: TopLogits | None = None
    head_states: HeadStates | None = None
    teachers: dict[int, Signals] = field(default_factory=dict)

    def of_teacher(self, number: int | None) -> Signals:
        """What one of several teachers showed; the only one where `number` is None."""
        return self if number is None else self.teachers[number]

    def named_tensors(self) -> dict[str, Tensor]:
        """Every tensor by a name that a person can read."""
        states = {key.name.rstrip("."): tensor for key, tensor in self.hidden_states.items()}
        scores = {key.name: tensor for key, tensor in self.attention_scores.items()}
        vectors = {key.name: tensor for key, tensor in self.attention_vectors.items()}
        selected = {key.name.rstrip("."): state.values for key, state in self.selected_states.items()}
        return {**self._predictions(), **states, **selected, **vectors, **scores}

    def _predictions(self) -> dict[str, Tensor]:
        named = dict(self.logits)
        if self.top_logits is not None:
            named["top_logits"] = self.top_logits.values
            named |= {f"top_logits.rest.{temperature:g}": others for temperature, others in self.top_logits.rest.items()}
        if self.head_states is not None:
            named["head_states"] = self.head_states.states
        return named

    def moved(self, move: Callable[[Tensor], Tensor]) -> Signals:
        """Every tensor through `move`: to a device, into pinned memory."""
        return Signals(
            logits={name: move(tensor) for name, tensor in self.logits.items()},
            hidden_states={key: move(tensor) for key, tensor in self.hidden_states.items()},
            selected_states={key: state.moved(move) for key, state in self.selected_states.items()},
            attention_scores={key: move(tensor) for key, tensor in self.attention_scores.items()},
            attention_vectors={key: move(tensor) for key, tensor in self.attention_vectors.items()},
            scales={key: move(tensor) for key, tensor in self.scales.items()},
            top_logits=None if self.top_logits is None else self.top_logits.moved(move),
            head_states=None if self.head_states is None else replace(self.head_states, states=move(self.head_states.states)),
            teachers={number: each.moved(move) for number, each in self.teachers.items()},
        )

    def decoded(self) -> Signals:
        """The same, with every hidden state in the numbers that a loss compares."""
        states = {key: self.hidden_states[key].float() * scales[..., None] for key, scales in self.scales.items()}
        return replace(self, hidden_states={**self.hidden_states, **states}, scales={})


class SignalSource(Protocol):
    """Whoever can show the teacher's side of a batch."""

    def signals(self, inputs: Mapping[str, Tensor], spec: SignalSpec) -> Signals:
        """Give what `spec` asks for on the batch `inputs`, without gradients."""
        ...

    def close(self) -> None:
        """Let go of what it holds while a run lasts: hooks, open files."""
        ...


def logits_of(outputs: Mapping[str, object]) -> dict[str, Tensor]:
    """The logits in a model's output, by name."""
    return {name: value for name in LOGITS if isinstance(value := outputs.get(name), torch.Tensor)}
