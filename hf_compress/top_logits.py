"""The k largest logits of each token, and all others as one: what is kept of a language model's predictions.

    vocabulary   z_1 ........................ z_V            V numbers a token
    kept         z_a z_b ... (k, falling)     their ids      r_T = T * log sum exp(z / T) of the others, for each temperature T

A softmax does not change when a constant is added to all its logits, so a token's numbers are kept up to one. At a temperature T the k
logits and r_T, divided by T, are the logits of k + 1 events ("it is a", "it is b", ..., "it is another word"), whose probabilities are
exactly those that the whole softmax gives them. The r of one temperature says nothing of another's, so there is one for each.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor


@dataclass(frozen=True)
class TopLogits:
    """What is kept of some tokens' logits.

    Attributes:
        values: (..., k), falling.
        ids: (..., k) int64, the words whose logits they are.
        rest: by temperature, (...,): the others as one logit. Empty where there are no others.
        vocabulary: how many words there are in all.
    """

    values: Tensor
    ids: Tensor
    rest: Mapping[float, Tensor]
    vocabulary: int

    @classmethod
    def of(cls, logits: Tensor, k: int, temperatures: Sequence[float]) -> TopLogits:
        """Keep the k largest.

        Args:
            logits: (..., vocabulary).
            k: how many, at least 1; the vocabulary's size or more keeps all.
            temperatures: at which the others are summed up.
        """
        vocabulary = logits.shape[-1]
        values, ids = logits.topk(min(k, vocabulary), -1)
        wanted = temperatures if k < vocabulary else ()
        return cls(values, ids, {temperature: _others(logits, ids, temperature) * temperature for temperature in wanted}, vocabulary)

    def narrowed(self, k: int) -> TopLogits:
        """The k largest of them; those that go are added to the rest."""
        if k >= self.values.shape[-1]:
            return self
        going = self.values[..., k:]
        rest = {
            temperature: torch.cat([going, others[..., None]], -1).div(temperature).logsumexp(-1) * temperature
            for temperature, others in self.rest.items()
        }
        return TopLogits(self.values[..., :k], self.ids[..., :k], rest, self.vocabulary)

    def events(self, temperature: float) -> Tensor:
        """(..., k + 1) logits of the events, divided by the temperature; k where there are no others."""
        if not self.rest:
            return self.values / temperature
        return torch.cat([self.values, self.rest[temperature][..., None]], -1) / temperature

    def events_of(self, logits: Tensor, temperature: float) -> Tensor:
        """(..., vocabulary) logits of another model -> (..., k + 1): its own for the same events."""
        top = logits.gather(-1, self.ids) / temperature
        if not self.rest:
            return top
        return torch.cat([top, _others(logits, self.ids, temperature)[..., None]], -1)

    def at(self, places: Tensor) -> TopLogits:
        """Those of some tokens, counted over all leading dimensions.

        Args:
            places: (n,) int64.
        """
        k = self.values.shape[-1]
        taken = {temperature: others.flatten()[places] for temperature, others in self.rest.items()}
        return replace(self, values=self.values.reshape(-1, k)[places], ids=self.ids.reshape(-1, k)[places], rest=taken)

    def moved(self, move: Callable[[Tensor], Tensor]) -> TopLogits:
        """Every tensor through `move`."""
        rest = {temperature: move(others) for temperature, others in self.rest.items()}
        return replace(self, values=move(self.values), ids=move(self.ids), rest=rest)


def _others(logits: Tensor, ids: Tensor, temperature: float) -> Tensor:
    """log sum exp(z / T) of the words that `ids` does not name: (...,)."""
    return (logits / temperature).scatter(-1, ids, float("-inf")).logsumexp(-1)
