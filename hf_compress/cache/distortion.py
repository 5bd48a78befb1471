"""What is lost of the teacher's hidden states when only part of them is kept: measured on a sample, without training anything.

    half of the examples    -> pca basis of each layer; ridge regressions from a layer's leading directions to every other layer
    the other half          -> for each token and layer: what is not recovered

A token's state in a layer is recovered from the nearest kept layer, from that one upwards, in which the token is kept. In its own layer
that is the projection on the kept directions; from another layer it is predicted, so leaving out a layer that its neighbours tell costs
little. What no kept layer holds is lost whole. The error of the number format comes on top.

A layer's loss is its share of the layer's variance, and the layers count alike. Half of a token's weight is uniform; the other half
goes to the tokens that the summary token attends to (the ranking of attention_no_sep, the mean over layers), which are the ones that
teach most (MUD, arXiv 2106.05691). Examples weigh alike.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from hf_compress.cache.codec import codec_error
from hf_compress.cache.codec_name import CodecName
from hf_compress.errors import CacheError

# The rank of a token that is never chosen: special ones.
NEVER = 2**31 - 1
# Share of a token's weight that the teacher's attention gives.
ATTENTION_SHARE = 0.5
# Of a layer's mean variance along a direction; what the regressions are held back by.
RIDGE = 1e-3


@dataclass(frozen=True)
class SampledBatch:
    """What a teacher showed of some examples.

    Attributes:
        states: by layer, (batch, tokens, dimensions).
        real: (batch, tokens) bool, True where a token is real.
        ranks: by layer, (batch, tokens) int64: in which place a token is chosen, from 0; `NEVER` where it is not.
        importance: (batch, tokens), 0 at tokens that are never chosen; None where nothing is known of it.
    """

    states: Mapping[int, Tensor]
    real: Tensor
    ranks: Mapping[int, Tensor]
    importance: Tensor | None


@dataclass(frozen=True)
class Sample:
    """The real tokens of a sample of examples, one after another.

    Attributes:
        states: by layer, (tokens, dimensions) float32.
        ranks: by layer, (tokens,) int64; see `SampledBatch`.
        weights: (tokens,) float32; those of an example sum to 1.
        fits: (tokens,) bool: what regressions are learnt on, every other example; the others tell how good they are.
    """

    states: Mapping[int, Tensor]
    ranks: Mapping[int, Tensor]
    weights: Tensor
    fits: Tensor

    @classmethod
    def of(cls, batches: Iterable[SampledBatch]) -> Sample:
        """Put batches together.

        Raises:
            CacheError: for no batch, or states that are not finite.
        """
        found = list(batches)
        if not found:
            raise CacheError("There is no example to measure on.")
        layers = sorted(found[0].states)
        states = {layer: torch.cat([batch.states[layer][batch.real].float().cpu() for batch in found]) for layer in layers}
        for layer, values in states.items():
            if not bool(values.isfinite().all()):
                raise CacheError(
                    f"The teacher's layer {layer} is NaN or infinite for some examples. Load it in float32 (--teacher_dtype float32)."
                )
        ranks = {layer: torch.cat([batch.ranks[layer][batch.real] for batch in found]) for layer in layers}
        weights = torch.cat([_weights(batch)[batch.real] for batch in found])
        examples = torch.cat([torch.full((int(count),), number) for number, count in enumerate(_lengths(found))])
        alone = int(examples.max()) == 0  # one example is all there is: it fits and tells
        return cls(states, ranks, weights, (examples % 2 == 0) | alone)


class Distortion:
    """Measures what selections lose.

    Args:
        sample: of the teacher's states.
        widths: numbers of leading directions that may be kept, ascending; after them come all dimensions as they are.
        codecs: the number formats.
        rotate: whether the leading directions are to be found; else the dimensions are taken as they come, as those of a stored basis.
    """

    def __init__(self, sample: Sample, widths: Sequence[int], codecs: Sequence[CodecName], *, rotate: bool = True) -> None:
        self.sample, self.widths, self.codecs = sample, tuple(widths), tuple(codecs)
        one_half = bool(sample.fits.all())
        self._tells = torch.ones_like(sample.fits) if one_half else ~sample.fits
        weights = sample.weights[sample.fits]
        self._fit_weights = weights / weights.sum()
        self._weights = sample.weights[self._tells] / sample.weights[self._tells].sum()
        self._ranks = {layer: ranks[self._tells] for layer, ranks in sample.ranks.items()}
        self._fit: dict[int, Tensor] = {}
        self._told: dict[int, Tensor] = {}
        self._whole: dict[int, Tensor] = {}
        for layer, states in sample.states.items():
            self._centre(layer, states, rotate)
        self._codec_errors: dict[int, Tensor] = {}
        self._recovered: dict[tuple[int, int], tuple[Tensor, Tensor]] = {}

    def lost(self, kept: Sequence[int], tokens: int | None) -> Tensor:
        """The share of the layers' variance that is lost.

        Args:
            kept: the layers that are stored.
            tokens: how many of each example; None for all.

        Returns:
            (codecs, widths + 1) float64: 0 if nothing is lost; infinite where the numbers do not fit the codec. The last width is whole.
        """
        layers = sorted(self.sample.states)
        shares = torch.stack([self._lost_of(layer, kept, tokens) for layer in layers]).mean(0)
        return shares.nan_to_num(nan=float("inf"), posinf=float("inf"))  # nothing times infinity: what cannot be written is no help

    def _lost_of(self, layer: int, kept: Sequence[int], tokens: int | None) -> Tensor:
        lost = torch.zeros(len(self.codecs), len(self.widths) + 1, dtype=torch.float64)
        left = torch.ones(len(self._weights), dtype=torch.bool)
        for source in _nearest(layer, kept):
            here = left if tokens is None else left & (self._ranks[source] < tokens)
            left = left & ~here
            weights = self._weights[here].double()
            missing, gain = self._recover(layer, source)  # (widths + 1, tokens), (widths + 1,)
            lost += (missing[:, here].double() @ weights)[None] + gain.double()[None] * (self._errors(source)[..., here].double() @ weights)
        lost += self._whole[layer][left].double() @ self._weights[left].double()
        whole = float(self._whole[layer].double() @ self._weights.double())
        return lost / whole if whole > 0 else torch.zeros_like(lost)

    def _centre(self, layer: int, states: Tensor, rotate: bool) -> None:
        """Turn a layer's states into coordinates along the directions in which they vary most, about the mean of the half that fits."""
        fit = states[self.sample.fits]
        mean = self._fit_weights @ fit
        centred = fit - mean
        if rotate:
            covariance = ((centred * self._fit_weights[:, None]).T @ centred).double()
            directions = torch.linalg.eigh(covariance).eigenvectors.flip(1).float()
        else:
            directions = torch.eye(states.shape[1])
        self._fit[layer] = centred @ directions
        self._told[layer] = (states[self._tells] - mean) @ directions
        self._whole[layer] = self._told[layer].square().sum(1)

    def _errors(self, layer: int) -> Tensor:
        """(codecs, widths + 1, tokens): squared error of each token's numbers, written and read."""
        if layer not in self._codec_errors:
            coordinates = self._told[layer]
            parts = [coordinates[:, :width] for width in self.widths] + [self.sample.states[layer][self._tells]]
            self._codec_errors[layer] = torch.stack([torch.stack([codec_error(part, codec) for part in parts]) for codec in self.codecs])
        return self._codec_errors[layer]

    def _recover(self, layer: int, source: int) -> tuple[Tensor, Tensor]:
        """What of a layer is missing behind another one's leading directions, or its own.

        Returns:
            missing: (widths + 1, tokens), squared error; gain: (widths + 1,), by how much an error of the source's numbers grows.
        """
        if (layer, source) not in self._recovered:
            self._recovered[layer, source] = self._own(layer) if layer == source else self._predicted(layer, source)
        return self._recovered[layer, source]

    def _own(self, layer: int) -> tuple[Tensor, Tensor]:
        missing = [self._told[layer][:, width:].square().sum(1) for width in self.widths]
        return torch.stack([*missing, torch.zeros_like(self._whole[layer])]), torch.ones(len(missing) + 1)

    def _predicted(self, layer: int, source: int) -> tuple[Tensor, Tensor]:
        """By ridge regression. Directions do not vary together, so each has a coefficient of its own, whatever other ones are kept."""
        fit = self._fit[source]
        weighted = fit * self._fit_weights[:, None]
        variances = (weighted * fit).sum(0)
        held_back = variances + RIDGE * variances.mean() + torch.finfo(torch.float32).tiny
        coefficients = (weighted.T @ self._fit[layer]) / held_back[:, None]  # (source's directions, layer's)
        left = self._told[layer].clone()
        # Nothing to go by is the first step: no more directions are used than help.
        missing, gains = [self._whole[layer]], [torch.zeros(())]
        best = float(missing[0] @ self._weights)
        begin = 0
        for end in (*self.widths, fit.shape[1]):
            left -= self._told[source][:, begin:end] @ coefficients[begin:end]
            found, begin = left.square().sum(1), end
            if (value := float(found @ self._weights)) < best:
                best = value
                missing.append(found)
                gains.append(coefficients[:end].square().sum() / end)
            else:
                missing.append(missing[-1])
                gains.append(gains[-1])
        return torch.stack(missing[1:]), torch.stack(gains[1:])


def _nearest(layer: int, kept: Sequence[int]) -> list[int]:
    """The kept layers that a layer is recovered from: it and those above, the nearest first; below the lowest of none, those below."""
    above = sorted(each for each in kept if each >= layer)
    return above or sorted(kept, reverse=True)


def _weights(batch: SampledBatch) -> Tensor:
    """(batch, tokens): half alike, half by the teacher's attention; each example's sum to 1."""
    real = batch.real.float()
    uniform = real / real.sum(1, keepdim=True).clamp(min=1)
    if batch.importance is None:
        return uniform
    attention = (batch.importance.float() * real).clamp(min=0)
    total = attention.sum(1, keepdim=True)
    # Where no token may be chosen there is nothing to prefer.
    preferred = torch.where(total > 0, attention / total.clamp(min=torch.finfo(torch.float32).tiny), uniform)
    return (1 - ATTENTION_SHARE) * uniform + ATTENTION_SHARE * preferred


def _lengths(batches: Iterable[SampledBatch]) -> list[int]:
    return [int(count) for batch in batches for count in batch.real.sum(1)]
