"""Which layers a strategy drops. Pure arithmetic: no model, no torch.

Layers are counted from 1. The rules are those of Sajjad, Dalvi, Durrani and Nakov, "On the Effect of Dropping Layers of
Pre-trained Transformer Models" (arXiv 2004.03844), section 2:

    strategy        of L layers drops K                    L=12, K=4      L=6, K=2
    top             the last K                             9-12           5-6
    bottom          the first K                            1-4            1-2
    symmetric       the middle K                           5-8            3-4
    alternate       L, L-2, L-4, ...                       6, 8, 10, 12   4, 6
    alternate_odd   L-1, L-3, L-5, ...                     5, 7, 9, 11    3, 5
    contribution    where input and output are most alike  measured, see `contribution`

The paper leaves open what symmetric does where L - K is odd: here the extra layer is kept at the bottom.
"""

from __future__ import annotations

import difflib
from typing import Literal, get_args

from hf_compress.errors import LayerDropError

LayerDropStrategy = Literal["top", "bottom", "symmetric", "alternate", "alternate_odd", "contribution"]
"""The closed list of strategies; flags and arguments take one of these words."""

STRATEGIES: tuple[LayerDropStrategy, ...] = get_args(LayerDropStrategy)


def check_strategy(strategy: str) -> LayerDropStrategy:
    """The strategy, if there is one of that name.

    Raises LayerDropError, with the nearest name, if there is none.
    """
    for known in STRATEGIES:
        if strategy == known:
            return known
    near = difflib.get_close_matches(str(strategy).lower().replace("-", "_"), STRATEGIES, n=1, cutoff=0.4)
    hint = f" Did you mean {near[0]!r}?" if near else ""
    raise LayerDropError(f"Unknown layer drop strategy {strategy!r}.{hint} Known are: {', '.join(STRATEGIES)}.")


def default_num_layers_to_drop(num_layers: int) -> int:
    """A third of the layers, rounded down, and at least 1."""
    return max(1, num_layers // 3)


def check_num_layers_to_drop(num_layers: int, num_layers_to_drop: int) -> None:
    """Raise LayerDropError unless at least one layer goes and at least one stays."""
    if num_layers_to_drop < 1:
        raise LayerDropError(
            f"num_layers_to_drop is {num_layers_to_drop}, but at least 1 layer has to be dropped. Leave out the strategy to drop none."
        )
    if num_layers_to_drop >= num_layers:
        raise LayerDropError(
            f"num_layers_to_drop is {num_layers_to_drop}, but the model has {num_layers} "
            f"layer{'s' if num_layers > 1 else ''} and has to keep "
            f"at least 1. " + (f"Choose a number from 1 to {num_layers - 1}." if num_layers > 1 else "It cannot lose any.")
        )


def layers_to_drop(strategy: LayerDropStrategy, num_layers: int, num_layers_to_drop: int | None = None) -> tuple[int, ...]:
    """The layers, counted from 1 and ascending, that `strategy` drops from a model of `num_layers`.

    Without `num_layers_to_drop` a third of the layers goes (rounded down, at least 1).
    Raises LayerDropError for an unknown strategy, for "contribution" (which has to be measured), if no layer would go or
    none stay, and for the alternating strategies beyond half the layers.
    """
    strategy = check_strategy(strategy)
    if strategy == "contribution":
        raise LayerDropError(
            "The strategy 'contribution' has to be measured on a model: call drop_layers(model, strategy='contribution', batches=...)."
        )
    count = default_num_layers_to_drop(num_layers) if num_layers_to_drop is None else num_layers_to_drop
    check_num_layers_to_drop(num_layers, count)
    if strategy == "top":
        return tuple(range(num_layers - count + 1, num_layers + 1))
    if strategy == "bottom":
        return tuple(range(1, count + 1))
    if strategy == "symmetric":
        kept_below = (num_layers - count + 1) // 2
        return tuple(range(kept_below + 1, kept_below + count + 1))
    last = num_layers if strategy == "alternate" else num_layers - 1
    possible = (last + 1) // 2
    if count > possible:
        raise LayerDropError(
            f"The strategy {strategy!r} drops every other layer from {last} down, which is {possible} of {num_layers} at most, but "
            f"num_layers_to_drop is {count}. Choose at most {possible}, or another strategy ('top' works for any number)."
        )
    return tuple(range(last - 2 * (count - 1), last + 1, 2))


def check_layer_numbers(layers: tuple[int, ...], num_layers: int, name: str) -> tuple[int, ...]:
    """`layers` in ascending order, if each is a layer of the model and none stands twice.

    `name` is the flag or argument that they came from, for the message. Raises LayerDropError.
    """
    if not layers:
        raise LayerDropError(f"{name} is empty: name at least one layer from 1 to {num_layers}.")
    for layer in layers:
        if isinstance(layer, bool) or not isinstance(layer, int):
            raise LayerDropError(f"{name} holds {layer!r}, but layers are whole numbers from 1 to {num_layers}.")
        if layer == 0:
            raise LayerDropError(
                f"{name} holds 0, but layers are counted from 1 here: the first is 1, the last is {num_layers}. Add 1 "
                "to each number that counts from 0."
            )
        if not 1 <= layer <= num_layers:
            raise LayerDropError(f"{name} holds {layer}, but the model's layers are 1 to {num_layers}.")
    twice = sorted({layer for layer in layers if layers.count(layer) > 1})
    if twice:
        raise LayerDropError(f"{name} names layer {', '.join(map(str, twice))} twice: name each layer once.")
    return tuple(sorted(layers))


def describe_layers(layers: tuple[int, ...]) -> str:
    """Layers as people write them: (1, 2, 3, 4, 9, 10, 11, 12) is "1-4 and 9-12"; none is "none"."""
    runs: list[tuple[int, int]] = []
    for layer in layers:
        if runs and layer == runs[-1][1] + 1:
            runs[-1] = (runs[-1][0], layer)
        else:
            runs.append((layer, layer))
    words = [str(first) if first == last else f"{first}-{last}" for first, last in runs]
    if not words:
        return "none"
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} and {words[-1]}"
