"""The transport plan against an exact linear program and a case by hand."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.optimize import linprog

from hf_compress.losses.transport import cheaper_first, transport_plan


def exact(costs: torch.Tensor, suppliers: torch.Tensor, receivers: torch.Tensor) -> float:
    """The least cost of one problem."""
    rows, columns = costs.shape
    sums = [np.kron(np.eye(rows)[row], np.ones(columns)) for row in range(rows)]
    sums += [np.kron(np.ones(rows), np.eye(columns)[column]) for column in range(columns)]
    weights = torch.cat([suppliers, receivers]).numpy()
    # The last sum follows from the others, and would not to the last bit.
    found = linprog(costs.flatten().numpy(), A_eq=np.array(sums)[:-1], b_eq=weights[:-1], method="highs")
    assert found.success
    return float(found.fun)


def problems(rows: int, columns: int, kind: str, count: int = 8) -> torch.Tensor:
    generator = torch.Generator().manual_seed(rows * columns)
    noise = torch.rand(count, rows, columns, generator=generator)
    if kind == "random":
        return noise
    if kind == "uneven":
        return 100 * noise**4
    places = torch.arange(rows)[:, None] / rows - torch.arange(columns)[None, :] / columns  # layers that lie far apart differ more
    return 0.3 + places.abs() + 0.1 * noise


@pytest.mark.parametrize("kind", ["random", "uneven", "layers"])
@pytest.mark.parametrize(("rows", "columns"), [(2, 4), (4, 12), (6, 12), (3, 3)])
def test_a_plan_is_about_as_cheap_as_the_best(rows: int, columns: int, kind: str) -> None:
    costs = problems(rows, columns, kind)
    suppliers = torch.rand(len(costs), rows, generator=torch.Generator().manual_seed(1)) + 0.1
    suppliers = suppliers / suppliers.sum(1, keepdim=True)
    receivers = torch.full((len(costs), columns), 1 / columns)
    flow = transport_plan(costs, suppliers, receivers)
    assert bool((flow >= 0).all())
    assert torch.allclose(flow.sum(2), suppliers, atol=1e-6) and torch.allclose(flow.sum(1), receivers, atol=1e-6)
    for number, cost in enumerate(costs):
        paid, least = float((flow[number] * cost).sum()), exact(cost, suppliers[number], receivers[number])
        assert -1e-5 <= (paid - least) / float(cost.mean()) < 0.04
        # It would be no plan at all that sends the same share everywhere.
        spread = float((suppliers[number][:, None] * receivers[number][None, :] * cost).sum())
        assert paid - least < 0.25 * (spread - least)


def test_by_hand() -> None:
    # Each supplier has one receiver that costs nothing, and gives it all it has.
    costs = torch.tensor([[[0.0, 1.0], [1.0, 0.0]]])
    flow = transport_plan(costs, torch.tensor([[0.5, 0.5]]), torch.tensor([[0.5, 0.5]]))
    assert torch.allclose(flow, torch.tensor([[[0.5, 0.0], [0.0, 0.5]]]), atol=1e-6)
    # The first may give half of its 0.6 to its own, and the rest goes where it costs.
    flow = transport_plan(costs, torch.tensor([[0.6, 0.4]]), torch.tensor([[0.3, 0.7]]))
    assert torch.allclose(flow, torch.tensor([[[0.3, 0.3], [0.0, 0.4]]]), atol=1e-5)


def test_costs_of_nothing_and_large_ones_give_a_plan() -> None:
    even = torch.full((1, 3), 1 / 3)
    for scale in (0.0, 1e-20, 1e20):
        flow = transport_plan(scale * problems(3, 3, "random")[:1], even, even)
        assert bool(flow.isfinite().all()) and torch.allclose(flow.sum(1), even, atol=1e-6)


def test_who_pays_less_weighs_more() -> None:
    flow, costs = torch.tensor([[[0.5, 0.0], [0.0, 0.5]]]), torch.tensor([[[1.0, 9.0], [9.0, 3.0]]])
    suppliers, receivers = cheaper_first(flow, costs)
    assert torch.allclose(suppliers, torch.tensor([[0.75, 0.25]])) and torch.allclose(receivers, suppliers)
    suppliers, _ = cheaper_first(flow, torch.zeros(1, 2, 2))
    assert torch.allclose(suppliers, torch.tensor([[0.5, 0.5]]))
