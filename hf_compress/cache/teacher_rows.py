"""The teacher's forward, as a builder needs it: the signals that are stored, and what tokens are ranked by."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from hf_compress.cache.encode import Encoder, Rows
from hf_compress.cache.predictions import TopK
from hf_compress.cache.select import select
from hf_compress.cache.selection import Selection, ranking_layer
from hf_compress.cache.stack_sizes import StackSizes
from hf_compress.cache.tokens import token_importance
from hf_compress.errors import TeacherError
from hf_compress.signals import AttentionScores, HiddenState, Signals, SignalSource, SignalSpec

Inputs = dict[str, Tensor]


@dataclass(frozen=True)
class Said:
    """What the teacher says of one batch.

    Attributes:
        signals: the signals, where the teacher left them.
        importance: (batch, tokens) of each hidden state, on the CPU, where its tokens are ranked.
        real: (batch, tokens) bool, on the CPU.
        special: (batch, tokens) bool, on the CPU: special tokens, without the one that sums the example up.
    """

    signals: Signals
    importance: Mapping[HiddenState, Tensor]
    real: Tensor
    special: Tensor

    def rows(self, encoder: Encoder) -> Rows:
        """As they are stored."""
        return encoder.encode(self.signals, self.real, self.special, self.importance)

    def on_cpu(self) -> Said:
        """The same, to be kept for a while."""
        return replace(self, signals=self.signals.moved(Tensor.cpu))

    @property
    def nbytes(self) -> int:
        """What the signals take in memory."""
        return sum(tensor.nbytes for tensor in self.signals.named_tensors().values())


@dataclass(frozen=True)
class TeacherRun:
    """A teacher that is asked for what a cache stores.

    Attributes:
        source: the teacher.
        spec: the signals to store.
        selection: what is kept of hidden states.
        device: where the teacher is.
        forward_context: what its forward runs under (autocast).
        ranks: whether its attention can be seen, so that tokens can be ranked.
        summary_last: the stacks whose last token sums an example up, not the first.
        top: how much of a language model's logits is stored; None for all.
    """

    source: SignalSource
    spec: SignalSpec
    selection: Selection
    device: torch.device
    forward_context: Callable[[], AbstractContextManager[object]]
    ranks: bool
    summary_last: frozenset[str] = frozenset()
    top: TopK | None = None

    def __post_init__(self) -> None:
        if self.selection.needs_importance and self.spec.hidden_states and not self.ranks:
            raise TeacherError(
                f"Tokens are to be selected by {self.selection.length}, but the teacher computes its attention in a way of its own, so it "
                "cannot be seen. Select the first tokens (hsk_length left_first), or all."
            )

    @property
    def ranking(self) -> dict[HiddenState, AttentionScores]:
        """The layer whose attention ranks the tokens of a hidden state: the one that it comes out of."""
        if not self.ranks or not (self.selection.needs_importance or self.selection.length == "all"):
            return {}
        return {key: AttentionScores(key.stack, ranking_layer(key.layer)) for key in self.spec.hidden_states}

    def ask(self, inputs: Inputs, real: Tensor, special: Tensor) -> Said:
        """One forward.

        Args:
            inputs: right-padded, on the CPU.
            real: (batch, tokens) bool, on the CPU.
            special: (batch, tokens) bool, on the CPU.

        Raises:
            TeacherError: if a signal is not finite at a real token.
        """
        ranking = self.ranking
        asked = self.spec | SignalSpec(attention_scores=frozenset(ranking.values()))
        top = self.top if self.spec.logits else None
        if top is not None:  # batch x tokens x vocabulary is never made
            asked = replace(asked, logits=False, head_states=True)
        on_device = real.to(self.device)
        with self.forward_context():
            signals = self.source.signals({name: value.to(self.device) for name, value in inputs.items()}, asked)
            if top is not None:
                assert signals.head_states is not None
                signals.top_logits, signals.head_states = top.of_head(signals.head_states, on_device), None
        importance = {}
        for key, score_key in ranking.items():
            scores = signals.attention_scores[score_key]
            importance[key] = token_importance(scores, on_device, self._summary(real).to(self.device), self.selection.rank_by).cpu()
        signals.attention_scores = {key: signals.attention_scores[key] for key in self.spec.attention_scores}
        _refuse_not_finite(signals, real)
        return Said(signals, importance, real, self.only_special(real, special))

    def selected_states(self, said: Said) -> dict[HiddenState, Tensor]:
        """(tokens, hidden) of each hidden state, at the tokens that will be stored, with all their dimensions."""
        whole = replace(self.selection, width=1.0, width_scheme="all")
        found = {}
        for key, states in said.signals.hidden_states.items():
            chosen = select(states.float().cpu(), said.real, said.special, said.importance.get(key), whole, None)
            found[key] = chosen.values[chosen.chosen]
        return found

    def _summary(self, real: Tensor) -> Tensor:
        """(batch,) where the token stands that sums the example up; there is one stack of layers."""
        return real.sum(1) - 1 if self.summary_last else torch.zeros(len(real), dtype=torch.int64)

    def only_special(self, real: Tensor, special: Tensor) -> Tensor:
        """Special tokens, without the one that sums the example up: that competes with words."""
        return special & (torch.arange(real.shape[1]) != self._summary(real)[:, None])


def _refuse_not_finite(signals: Signals, real: Tensor) -> None:
    for name, tensor in signals.named_tensors().items():
        at_tokens = tensor.dim() == 3 and tensor.shape[:2] == real.shape
        looked_at = tensor[real.to(tensor.device)] if at_tokens else tensor
        if name.startswith("attention_"):
            continue  # the scores and vectors of padding may be anything; what is stored of them is looked at when it is encoded
        if not bool(looked_at.isfinite().all()):
            raise TeacherError(
                f"The teacher's {name} is NaN or infinite for some examples, so it cannot teach. Load it in float32 "
                "(--teacher_dtype float32), and look at its own score."
            )


def blank_signals(
    spec: SignalSpec, run: TeacherRun, sizes: Mapping[str, StackSizes], logits: Mapping[str, tuple[int, ...]]
) -> Callable[[int], tuple[Signals, Mapping[HiddenState, Tensor]]]:
    """Made-up signals in the shapes of the real ones, to see what they take on disk.

    Args:
        spec: what is stored.
        run: whose ranking counts.
        sizes: by stack.
        logits: by name, the shape that the model's logits have of one example; -1 stands for its tokens.
    """

    def blank(tokens: int) -> tuple[Signals, Mapping[HiddenState, Tensor]]:
        signals = Signals()
        if spec.logits:
            if run.top is not None:
                signals.top_logits = run.top.blank(tokens, logits["logits"][-1])
            else:
                signals.logits = {name: torch.zeros(1, *(tokens if size == -1 else size for size in of)) for name, of in logits.items()}
        for key in spec.hidden_states:
            signals.hidden_states[key] = torch.zeros(1, tokens, sizes[key.stack].hidden_size)
        for score_key in spec.attention_scores:
            signals.attention_scores[score_key] = torch.zeros(1, sizes[score_key.stack].num_attention_heads, tokens, tokens)
        for vector_key in spec.attention_vectors:
            heads, width = sizes[vector_key.stack].vectors[vector_key.kind]
            signals.attention_vectors[vector_key] = torch.zeros(1, heads, tokens, width)
        return signals, {key: torch.zeros(1, tokens) for key in run.ranking}

    return blank
