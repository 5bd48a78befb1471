"""Which dimensions: the paper's rules by hand and against plain loops, masks as bits, and the basis of principal components."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from hf_compress.cache.selection import Selection
from hf_compress.cache.widths import magnitude_mask, pack_mask, pca_basis, random_dimensions, uniform_dimensions, unpack_mask
from hf_compress.errors import ArgumentError, CacheError
from hf_compress.selected_state import Subspace


def test_random_dimensions_are_nested_sorted_and_of_their_seed() -> None:
    previous: set[int] = set()
    for count in (1, 7, 76, 768):
        drawn = random_dimensions(768, count, seed=5)
        assert drawn.dtype == torch.int64
        assert drawn.tolist() == sorted(set(drawn.tolist()))
        assert len(drawn) == count
        assert previous <= set(drawn.tolist()) <= set(range(768))
        previous = set(drawn.tolist())
    assert random_dimensions(768, 76, 5).tolist() == random_dimensions(768, 76, 5).tolist()
    assert random_dimensions(768, 76, 5).tolist() != random_dimensions(768, 76, 6).tolist()


def test_random_dimensions_are_those_of_older_caches() -> None:
    # Written down once: a cache that holds the seed must mean the same dimensions years later.
    assert random_dimensions(16, 4, seed=0).tolist() == FROZEN


FROZEN = [1, 6, 8, 9]


def test_random_dimensions_leave_the_runs_random_numbers_alone() -> None:
    torch.manual_seed(1)
    np.random.seed(1)
    expected = torch.rand(1).item(), np.random.rand()
    torch.manual_seed(1)
    np.random.seed(1)
    random_dimensions(768, 76, 5)
    assert (torch.rand(1).item(), np.random.rand()) == expected


def test_uniform_dimensions_by_hand() -> None:
    assert uniform_dimensions(768, 0.1).tolist() == list(range(0, 760, 10))
    assert uniform_dimensions(6, 0.4).tolist() == [0, 2]  # 0 and 2.5: halves to the even one
    assert uniform_dimensions(5, 0.1).tolist() == [0]
    assert uniform_dimensions(5, 1.0).tolist() == [0, 1, 2, 3, 4]


def test_uniform_dimensions_are_distinct_and_as_many_as_the_selection_says() -> None:
    for hidden in (7, 312, 768):
        for percent in range(1, 101):
            width = percent / 100
            got = uniform_dimensions(hidden, width).tolist()
            assert got == sorted(set(got))
            assert 0 <= got[0] <= got[-1] < hidden
            assert len(got) == Selection(width=width, width_scheme="all" if width == 1 else "uniform").num_dimensions(hidden)


@pytest.mark.parametrize("count", [0, 9])
def test_dimensions_that_are_not_there(count: int) -> None:
    with pytest.raises(ArgumentError, match=f"{count} dimensions of 8 were asked for: give 1 to 8"):
        random_dimensions(8, count, 0)
    with pytest.raises(ArgumentError, match="width is"):
        uniform_dimensions(8, count)


def test_magnitude_by_hand() -> None:
    # Two tokens of three dimensions each; half of an example's six entries are kept, where two tokens were chosen.
    states = torch.tensor([[[1.0, -5.0, 2.0], [4.0, 0.0, -3.0]], [[0.1, 0.3, -0.2], [9.0, 9.0, 9.0]]])
    chosen = torch.tensor([[True, True], [True, False]])
    expected = torch.tensor([[[0, 1, 0], [1, 0, 1]], [[0, 1, 0], [0, 0, 0]]]).bool()
    assert torch.equal(magnitude_mask(states, chosen, 0.5), expected)


def test_magnitude_counts_by_example_and_not_by_batch() -> None:
    # All of the second example is smaller than all of the first: a threshold over the batch would leave it nothing.
    states = torch.cat([100 + torch.rand(1, 4, 10), torch.rand(1, 4, 10)])
    mask = magnitude_mask(states, torch.ones(2, 4).bool(), 0.25)
    assert mask.sum((1, 2)).tolist() == [10, 10]
    for row in range(2):
        assert torch.equal(mask[row : row + 1], magnitude_mask(states[row : row + 1], torch.ones(1, 4).bool(), 0.25))


def test_equal_entries_are_kept_from_the_start() -> None:
    states = torch.full((1, 2, 4), -2.0)
    states[0, 1, 3] = 3.0
    assert magnitude_mask(states, torch.ones(1, 2).bool(), 0.5).flatten().tolist() == [True, True, True, False, False, False, False, True]
    assert magnitude_mask(torch.zeros(1, 2, 4), torch.ones(1, 2).bool(), 0.5).flatten().tolist() == [True] * 4 + [False] * 4


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_magnitude_is_the_plain_loops(dtype: torch.dtype) -> None:
    for _ in range(60):
        batch, tokens, hidden = (int(torch.randint(1, 7, ())) for _ in range(3))
        states = torch.randint(-3, 4, (batch, tokens, hidden)).to(dtype)  # many ties
        chosen = torch.rand(batch, tokens) < 0.7  # rows without a token among them
        width = float(torch.rand(()).clamp(min=0.01))
        got = magnitude_mask(states, chosen, width)
        selection = Selection(width=width, width_scheme="magnitude")
        for row in range(batch):
            places = [(t, d) for t in range(tokens) if chosen[row, t] for d in range(hidden)]
            places.sort(key=lambda place: (-abs(float(states[row][place])), place))
            kept = set(places[: selection.num_entries(int(chosen[row].sum()), hidden)])
            assert {tuple(place) for place in got[row].nonzero().tolist()} == kept


def test_magnitude_of_a_smaller_share_is_part_of_a_larger() -> None:
    states = torch.randint(-3, 4, (3, 5, 8)).float()
    chosen = torch.ones(3, 5).bool()
    larger = magnitude_mask(states, chosen, 0.6)
    smaller = magnitude_mask(states, chosen, 0.2)
    assert not (smaller & ~larger).any()
    assert torch.equal(magnitude_mask(states * larger, chosen, 0.2), smaller)


def test_magnitude_keeps_what_is_not_finite_for_the_codec_to_refuse() -> None:
    states = torch.ones(1, 2, 4)
    states[0, 1, 2] = float("nan")
    states[0, 0, 3] = -float("inf")
    mask = magnitude_mask(states, torch.ones(1, 2).bool(), 0.25)
    assert mask.nonzero().tolist() == [[0, 0, 3], [0, 1, 2]]
    assert magnitude_mask(states, torch.zeros(1, 2).bool(), 0.25).sum() == 0
    assert magnitude_mask(states[:, :0], torch.zeros(1, 0).bool(), 0.25).shape == (1, 0, 4)


@pytest.mark.parametrize("hidden", [1, 7, 8, 9, 312, 768])
def test_masks_as_bits(hidden: int) -> None:
    mask = torch.rand(5, hidden) < 0.3
    packed = pack_mask(mask)
    assert packed.dtype == torch.uint8
    assert np.array_equal(packed.numpy(), np.packbits(mask.numpy(), axis=-1, bitorder="little"))
    assert torch.equal(unpack_mask(packed, hidden), mask)
    assert unpack_mask(packed[:0], hidden).shape == (0, hidden)


def test_masks_by_hand() -> None:
    mask = torch.zeros(1, 10).bool()
    mask[0, [0, 3, 9]] = True
    assert pack_mask(mask).tolist() == [[0b00001001, 0b00000010]]
    with pytest.raises(CacheError, match="2 bytes a token; 768 dimensions take 96"):
        unpack_mask(pack_mask(mask), 768)


def sample_in_subspace(samples: int = 200, hidden: int = 24, rank: int = 5) -> torch.Tensor:
    directions = torch.linalg.qr(torch.randn(hidden, rank)).Q
    spread = torch.tensor([5.0, 4.0, 3.0, 2.0, 1.0])
    return torch.randn(samples, rank) * spread @ directions.T + 10 * torch.randn(hidden)


def projected(basis: Subspace, states: torch.Tensor) -> torch.Tensor:
    """The coordinates that a loss compares."""
    return basis.compared(states, states[..., :0])[0]


def restored(basis: Subspace, states: torch.Tensor) -> torch.Tensor:
    """The nearest states that the basis can show."""
    return projected(basis, states) @ basis.components.T + basis.mean


def explained(basis: Subspace, states: torch.Tensor) -> torch.Tensor:
    """(directions,) the share of the sample's variance along each."""
    return projected(basis, states).double().var(0) / states.double().var(0).sum()


def test_pca_is_exact_in_a_subspace() -> None:
    states = sample_in_subspace()
    basis = pca_basis(states, 5)
    assert float(explained(basis, states).sum()) == pytest.approx(1, abs=1e-6)
    assert torch.allclose(restored(basis, states), states, atol=2e-5)
    # Distances are kept: what the projected states differ by is what the states differ by.
    assert torch.allclose(torch.pdist(projected(basis, states).double()), torch.pdist(states.double()), atol=1e-4)


def test_pca_is_numpys() -> None:
    states = torch.randn(300, 12) * torch.linspace(3, 0.1, 12)
    basis = pca_basis(states, 4)
    centred = states.double().numpy() - states.double().numpy().mean(0)
    _, singular, directions = np.linalg.svd(centred, full_matrices=False)
    assert np.allclose(basis.mean.numpy(), states.double().numpy().mean(0), atol=1e-6)
    assert np.allclose(np.abs(basis.components.numpy().T @ directions[:4].T), np.eye(4), atol=1e-4)
    assert explained(basis, states).numpy() == pytest.approx(singular[:4] ** 2 / (singular**2).sum(), rel=1e-5)


@pytest.mark.parametrize(("samples", "hidden", "count"), [(20, 8, 8), (8, 8, 8), (5, 40, 5), (9000, 16, 3)])
def test_pca_is_orthonormal_and_its_sign_is_set(samples: int, hidden: int, count: int) -> None:
    states = torch.randn(samples, hidden) * torch.linspace(2, 1, hidden)
    basis = pca_basis(states, count)
    assert basis.mean.dtype == basis.components.dtype == torch.float32
    components = basis.components.double()
    assert (components.T @ components - torch.eye(count).double()).abs().max() < 1e-6
    assert (components.gather(0, components.abs().argmax(0, keepdim=True)) > 0).all()
    again = pca_basis(states, count)
    assert torch.equal(basis.components, again.components)
    # The negated sample spreads along the same directions.
    mirrored = pca_basis(-states, count)
    assert torch.allclose(mirrored.components[:, :3], basis.components[:, :3], atol=1e-5)
    assert torch.allclose(mirrored.mean, -basis.mean, atol=1e-6)


def test_pca_by_rows_is_pca_at_once() -> None:
    # More rows than fit at once, and a mean far larger than the spread.
    states = torch.randn(20_000, 6).double() * torch.tensor([6.0, 5, 4, 3, 2, 1]).double() + 1000
    basis = pca_basis(states, 2)
    _, vectors = torch.linalg.eigh(torch.cov(states.T))
    assert torch.allclose(basis.components.double().abs(), vectors.flip(1)[:, :2].abs(), atol=1e-4)


def test_the_first_directions_are_a_smaller_basis() -> None:
    states = sample_in_subspace()
    large, small = pca_basis(states, 4), pca_basis(states, 2)
    assert torch.equal(large.components[:, :2], small.components) and torch.equal(large.mean, small.mean)


def test_gradients_flow_through_a_basis() -> None:
    basis = pca_basis(sample_in_subspace(), 3)
    student = torch.randn(2, 24, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda states: projected(basis, states), (student,))


def test_pca_of_states_that_are_all_equal() -> None:
    basis = pca_basis(torch.ones(4, 6), 2)
    assert torch.allclose(restored(basis, torch.ones(1, 6)), torch.ones(1, 6))


def test_pca_refuses_too_small_a_sample_and_nan() -> None:
    with pytest.raises(CacheError, match="needs a sample of at least 5 tokens, and there are 4"):
        pca_basis(torch.randn(4, 8), 5)
    with pytest.raises(ArgumentError, match="9 dimensions of 8"):
        pca_basis(torch.randn(40, 8), 9)
    with pytest.raises(CacheError, match="NaN or infinity"):
        pca_basis(torch.randn(40, 8).index_fill(0, torch.tensor([3]), float("nan")), 2)
