"""Linear layers and LayerNorms fitted to what they should give, in closed form, on a part of a sample; the rest chooses the penalty."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# Of the features' mean variance: from as good as none to one under which only strong directions count.
PENALTIES = (1e-6, 1e-4, 1e-3, 1e-2, 1e-1, 1.0)
_ROUNDS = 3
# A gain is divided by; one that is as good as 0 would ask for states without bound.
_SMALLEST_GAIN = 0.05


@dataclass(frozen=True)
class LinearFit:
    """An affine map: weight (outputs, features) and bias (outputs,), as `nn.Linear` holds them."""

    weight: Tensor
    bias: Tensor

    def __call__(self, features: Tensor) -> Tensor:
        """(..., features) -> (..., outputs)."""
        return F.linear(features, self.weight, self.bias)

    def put_into(self, layer: nn.Linear, rows: slice = slice(None)) -> None:
        """Make it the layer's own, or that of some of its outputs."""
        with torch.no_grad():
            layer.weight[rows] = self.weight
            if layer.bias is not None:
                layer.bias[rows] = self.bias


class Ridge:
    """Ridge regression on features that several targets share: their second moments are diagonalised once.

    Args:
        features: (tokens, features).
        fitted: (tokens,) bool, the tokens to fit on; on the others the penalty is chosen.
    """

    def __init__(self, features: Tensor, fitted: Tensor) -> None:
        self.features = features
        self._fitted = fitted
        self._mean = features[fitted].mean(0)
        self._centred = features[fitted] - self._mean
        self._held_out = features[~fitted]
        self._values, self._vectors = torch.linalg.eigh((self._centred.T @ self._centred).double())

    def fit(self, targets: Tensor) -> LinearFit:
        """The affine map from the features to the targets (tokens, outputs), under the penalty that serves the other tokens best."""
        ours, theirs = targets[self._fitted], targets[~self._fitted]
        mean = ours.mean(0)
        products = self._vectors.T @ (self._centred.T @ (ours - mean)).double()
        scale = self._values.clamp_min(0).mean().clamp_min(1e-30)
        best, best_error = None, float("inf")
        for penalty in PENALTIES:
            solved = self._vectors @ (products / (self._values.clamp_min(0) + penalty * scale)[:, None])
            weight = solved.T.to(targets.dtype)
            fit = LinearFit(weight, mean - weight @ self._mean)
            error = float((fit(self._held_out) - theirs).square().sum())
            if error < best_error:
                best, best_error = fit, error
        assert best is not None, "states are finite"
        return best


def fit_norm(norm: nn.LayerNorm, inputs: Tensor, targets: Tensor, fitted: Tensor) -> None:
    """Give a LayerNorm the gain and bias of the least squares, dimension by dimension; inputs and targets are (tokens, width)."""
    normal = _normalised(norm, inputs[fitted])
    wanted = targets[fitted]
    centred = normal - normal.mean(0)
    gain = (centred * (wanted - wanted.mean(0))).sum(0) / centred.square().sum(0).clamp_min(1e-12)
    with torch.no_grad():
        norm.weight.copy_(gain)
        norm.bias.copy_(wanted.mean(0) - gain * normal.mean(0))


def fit_residual(ridge: Ridge, norm: nn.LayerNorm, residual: Tensor | float, start: Tensor, targets: Tensor, fitted: Tensor) -> LinearFit:
    """Fit LayerNorm(residual + linear(features)) to targets: the linear map in closed form, the norm in closed form, and again.

    A LayerNorm is blind to its input's scale, so each round asks for the input that gives the target at the scale of the round before.

    Args:
        ridge: of the features.
        norm: gets its gain and bias.
        residual: (tokens, width), what the linear map's output is added to; 0 for none.
        start: (tokens, width), a first guess of the norm's input: the teacher's, narrowed.
        targets: (tokens, width).
        fitted: (tokens,) bool; the best round is that of the least error on the other tokens.

    Returns:
        The linear map.
    """
    fit_norm(norm, start, targets, fitted)
    inputs, best, best_error = start, None, float("inf")
    for _ in range(_ROUNDS):
        scale = inputs.var(-1, keepdim=True, unbiased=False).add(norm.eps).sqrt()  # (tokens, 1)
        gain = norm.weight.detach()
        least = _SMALLEST_GAIN * gain.abs().mean()
        gain = torch.where(gain < 0, gain.clamp_max(-least), gain.clamp_min(least))
        fit = ridge.fit(scale * (targets - norm.bias.detach()) / gain - residual)
        inputs = residual + fit(ridge.features)
        fit_norm(norm, inputs, targets, fitted)
        given = _normalised(norm, inputs) * norm.weight.detach() + norm.bias.detach()
        error = float((given - targets)[~fitted].square().sum())
        if error < best_error:
            best, best_error = (fit, norm.weight.detach().clone(), norm.bias.detach().clone()), error
    assert best is not None, "states are finite"
    with torch.no_grad():
        norm.weight.copy_(best[1])
        norm.bias.copy_(best[2])
    return best[0]


def _normalised(norm: nn.LayerNorm, inputs: Tensor) -> Tensor:
    return F.layer_norm(inputs, norm.normalized_shape, eps=norm.eps)
