"""Which part of a hidden state is kept: tokens first, then dimensions. Building and reading a smaller selection both go here."""

from __future__ import annotations

import torch
from torch import Tensor

from hf_compress.cache.selection import Selection
from hf_compress.cache.tokens import choose_tokens
from hf_compress.cache.widths import magnitude_mask
from hf_compress.errors import CacheError
from hf_compress.selected_state import AllDimensions, KeptEntries, SelectedState, SharedDimensions, Space, Subspace, at_positions


def select(
    states: Tensor, real: Tensor, special: Tensor, importance: Tensor | None, selection: Selection, space: Space | None
) -> SelectedState:
    """Keep some tokens of a layer's states, and some dimensions of these.

    Args:
        states: (batch, tokens, hidden).
        real: (batch, tokens) bool, True where a token is real.
        special: (batch, tokens) bool, True at special tokens but the one that sums the example up.
        importance: (batch, tokens), what the attention schemes rank by.
        selection: how many, and which.
        space: the dimensions that all tokens share (random, uniform, pca); None where there are none to share (all, magnitude).

    Returns:
        The tokens most important first, under the attention schemes; else in their order.

    Raises:
        CacheError: an attention scheme without `importance`.
    """
    if selection.length == "all":
        count = states.shape[1]
        positions = torch.arange(count).expand(len(states), count)
        chosen = real
        taken = states
    else:
        if selection.length != "left_first" and importance is None:
            raise CacheError(f"Tokens are to be selected by {selection.length}, but nothing says how important each token is.")
        assert selection.tokens is not None
        positions, chosen = choose_tokens(selection.length, selection.tokens, real, special, importance, nobody(real))
        taken = at_positions(states, positions)
    return reduce_width(SelectedState(taken, positions, chosen, AllDimensions()), selection, space)


def nobody(real: Tensor) -> Tensor:
    """(batch,) the summary token for `choose_tokens`, where what is told to be special leaves it out: no token needs an exception."""
    return torch.full((len(real),), -1, device=real.device)


def keeps_whole_states(selection: Selection) -> bool:
    """Whether every token keeps every dimension."""
    return selection.length == "all" and selection.width_scheme == "all"


def reduce_width(state: SelectedState, selection: Selection, space: Space | None) -> SelectedState:
    """Keep some dimensions of states that have all of them; see `select`."""
    taken, chosen = state.values, state.chosen
    if selection.width_scheme == "magnitude":
        kept = magnitude_mask(taken, chosen, selection.width)
        kept_entries = KeptEntries(kept, selection.width, selection.mask == "zero_target")
        return SelectedState(taken.masked_fill(~kept, 0.0), state.positions, chosen, kept_entries)
    if isinstance(space, SharedDimensions):
        return SelectedState(taken.index_select(-1, space.indices), state.positions, chosen, space)
    if isinstance(space, Subspace):
        return SelectedState((taken - space.mean) @ space.components, state.positions, chosen, space)
    return state
