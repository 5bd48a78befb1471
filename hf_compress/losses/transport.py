"""Optimal transport between few points, on the device: no value is read back, however many problems are solved at once.

    minimise  sum_ij F_ij C_ij     where F >= 0, its rows sum to the suppliers' weights, its columns to the receivers'

Solved with an entropy term (Sinkhorn, Cuturi 1306.0895), with a fixed number of rounds in which the entropy's weight falls; what is left
over is then handed out, so that rows and columns sum to what they must (Altschuler et al. 1705.09634, algorithm 2). The problems are tiny
and the rounds many, so what takes time is how many operations there are: seven a round.
"""

from __future__ import annotations

import torch
from torch import Tensor

ROUNDS = 50
# The entropy's weight, as a share of the mean cost: where it starts, where it ends, and after which share of the rounds.
_START, _END, _FALLING = 1.0, 0.02, 0.7


@torch.no_grad()
def transport_plan(costs: Tensor, suppliers: Tensor, receivers: Tensor) -> Tensor:
    """How much each supplier gives to each receiver; an approximation, a few percent of the mean cost dearer than the best at most.

    Args:
        costs: (problems, suppliers, receivers), not negative.
        suppliers: (problems, suppliers), above 0, each problem's sum 1.
        receivers: (problems, receivers), likewise.

    Returns:
        (problems, suppliers, receivers): the flow, without gradient. Its rows and columns sum to the weights.
    """
    tiny = torch.finfo(costs.dtype).tiny
    relative = costs / costs.mean((1, 2), keepdim=True).clamp(min=tiny)
    # No plan becomes better or worse by what all ways from, or to, a place cost more: so each row and column has a way that costs nothing.
    relative = relative - relative.amin(2, keepdim=True)
    relative = relative - relative.amin(1, keepdim=True)
    flow, entropy = (-relative / _START).exp(), _START
    for number in range(ROUNDS):
        lower = max(_END, _START * (_END / _START) ** (number / (_FALLING * ROUNDS)))
        if lower < entropy:  # exp((u + v - cost) / entropy), with the potentials u and v, is sharpened by a power
            flow, entropy = flow.pow_(entropy / lower), lower
        flow.mul_((suppliers / flow.sum(2))[:, :, None])
        flow.mul_((receivers / flow.sum(1))[:, None, :])
    flow = flow * (suppliers / flow.sum(2).clamp(min=tiny)).clamp(max=1)[:, :, None]
    flow = flow * (receivers / flow.sum(1).clamp(min=tiny)).clamp(max=1)[:, None, :]
    left, wanted = (suppliers - flow.sum(2)).clamp(min=0), (receivers - flow.sum(1)).clamp(min=0)
    return flow + left[:, :, None] * wanted[:, None, :] / left.sum(1).clamp(min=tiny)[:, None, None]


@torch.no_grad()
def cheaper_first(flow: Tensor, costs: Tensor) -> tuple[Tensor, Tensor]:
    """New weights of suppliers and receivers: who pays less for what it moves weighs more (BERT-EMD's cost attention).

        w_i  proportional to  1 / C_i,   C_i = sum_j F_ij C_ij / sum_j F_ij

    Args:
        flow, costs: (problems, suppliers, receivers).

    Returns:
        (problems, suppliers) and (problems, receivers), each problem's sum 1. A cost below a thousandth of the mean counts as that.
    """
    least = (costs.mean((1, 2))[:, None] / 1000).clamp(min=torch.finfo(costs.dtype).tiny)
    weights = []
    for over in (2, 1):
        paid = (flow * costs).sum(over) / flow.sum(over)
        shares = 1 / paid.maximum(least) * least  # no larger than 1
        weights.append(shares / shares.sum(1, keepdim=True))
    return weights[0], weights[1]
