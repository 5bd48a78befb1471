from __future__ import annotations

import pytest

from hf_compress.errors import LayerDropError
from hf_compress.layers.strategies import (
    STRATEGIES,
    LayerDropStrategy,
    check_layer_numbers,
    check_strategy,
    default_num_layers_to_drop,
    describe_layers,
    layers_to_drop,
)

# The table of arXiv 2004.03844 (its text and figure 1), for 12 and 6 layers; symmetric with an odd rest keeps the extra layer below.
PAPER: list[tuple[LayerDropStrategy, int, int, list[int]]] = [
    ("top", 12, 2, [11, 12]),
    ("top", 12, 4, [9, 10, 11, 12]),
    ("top", 12, 6, [7, 8, 9, 10, 11, 12]),
    ("top", 6, 1, [6]),
    ("top", 6, 2, [5, 6]),
    ("top", 6, 3, [4, 5, 6]),
    ("alternate", 12, 2, [10, 12]),
    ("alternate", 12, 3, [8, 10, 12]),
    ("alternate", 12, 4, [6, 8, 10, 12]),
    ("alternate", 12, 6, [2, 4, 6, 8, 10, 12]),
    ("alternate", 6, 1, [6]),
    ("alternate", 6, 2, [4, 6]),
    ("alternate", 6, 3, [2, 4, 6]),
    ("alternate_odd", 12, 2, [9, 11]),
    ("alternate_odd", 12, 4, [5, 7, 9, 11]),
    ("alternate_odd", 12, 5, [3, 5, 7, 9, 11]),
    ("alternate_odd", 12, 6, [1, 3, 5, 7, 9, 11]),
    ("alternate_odd", 6, 1, [5]),
    ("alternate_odd", 6, 2, [3, 5]),
    ("alternate_odd", 6, 3, [1, 3, 5]),
    ("symmetric", 12, 2, [6, 7]),
    ("symmetric", 12, 4, [5, 6, 7, 8]),
    ("symmetric", 12, 6, [4, 5, 6, 7, 8, 9]),
    ("symmetric", 6, 1, [4]),
    ("symmetric", 6, 2, [3, 4]),
    ("symmetric", 6, 3, [3, 4, 5]),
    ("bottom", 12, 2, [1, 2]),
    ("bottom", 12, 4, [1, 2, 3, 4]),
    ("bottom", 12, 6, [1, 2, 3, 4, 5, 6]),
    ("bottom", 6, 1, [1]),
    ("bottom", 6, 2, [1, 2]),
    ("bottom", 6, 3, [1, 2, 3]),
    ("alternate", 5, 2, [3, 5]),
    ("alternate", 5, 3, [1, 3, 5]),
    ("alternate_odd", 5, 2, [2, 4]),
]


# Symmetric of 6, K=3: "drops 3, 4, 5" would keep 1, 2 below and 6 above, so the extra layer is at the bottom.
@pytest.mark.parametrize(("strategy", "num_layers", "number", "expected"), PAPER)
def test_sets_of_the_paper(strategy: LayerDropStrategy, num_layers: int, number: int, expected: list[int]) -> None:
    assert list(layers_to_drop(strategy, num_layers, number)) == expected


@pytest.mark.parametrize(("num_layers", "number"), [(2, 1), (3, 1), (5, 1), (6, 2), (12, 4), (24, 8)])
def test_by_default_a_third_goes(num_layers: int, number: int) -> None:
    assert default_num_layers_to_drop(num_layers) == number
    assert layers_to_drop("top", num_layers) == tuple(range(num_layers - number + 1, num_layers + 1))


@pytest.mark.parametrize("strategy", [name for name in STRATEGIES if name != "contribution"])
@pytest.mark.parametrize("num_layers", range(2, 13))
def test_as_many_as_asked_for_and_each_a_layer(strategy: LayerDropStrategy, num_layers: int) -> None:
    for number in range(1, num_layers):
        possible = {"alternate": (num_layers + 1) // 2, "alternate_odd": num_layers // 2}.get(strategy, num_layers)
        if number > possible:
            with pytest.raises(LayerDropError, match=f"{possible} of {num_layers} at most"):
                layers_to_drop(strategy, num_layers, number)
            continue
        dropped = layers_to_drop(strategy, num_layers, number)
        assert len(set(dropped)) == number
        assert list(dropped) == sorted(dropped)
        assert dropped[0] >= 1
        assert dropped[-1] <= num_layers


def test_unknown_strategy_names_the_nearest() -> None:
    with pytest.raises(LayerDropError, match=r"'simmetric'\. Did you mean 'symmetric'\?"):
        check_strategy("simmetric")
    with pytest.raises(LayerDropError, match="'alternate_odd'"):
        check_strategy("alternate-od")
    with pytest.raises(LayerDropError, match="Known are: top, bottom"):
        check_strategy("zzz")


@pytest.mark.parametrize("number", [0, -1, 6, 7])
def test_too_few_or_too_many(number: int) -> None:
    with pytest.raises(LayerDropError, match=f"num_layers_to_drop is {number}"):
        layers_to_drop("top", 6, number)


def test_contribution_is_not_arithmetic() -> None:
    with pytest.raises(LayerDropError, match="has to be measured"):
        layers_to_drop("contribution", 6, 2)


@pytest.mark.parametrize(
    ("layers", "words"),
    [
        ((), "is empty"),
        ((0, 1), "counted from 1"),
        ((7,), "layers are 1 to 6"),
        ((-1,), "layers are 1 to 6"),
        ((2, 3, 2), "names layer 2 twice"),
        ((1.5,), "whole numbers"),
        ((True,), "whole numbers"),
    ],
)
def test_layer_numbers_that_are_none(layers: tuple[int, ...], words: str) -> None:
    with pytest.raises(LayerDropError, match=words) as raised:
        check_layer_numbers(layers, 6, "layers_to_drop")
    assert "layers_to_drop" in str(raised.value)


def test_layer_numbers_are_sorted() -> None:
    assert check_layer_numbers((5, 2, 3), 6, "layers_to_drop") == (2, 3, 5)


@pytest.mark.parametrize(
    ("layers", "words"),
    [
        ((1, 2, 3, 4, 9, 10, 11, 12), "1-4 and 9-12"),
        ((1, 3, 5), "1, 3 and 5"),
        ((1, 2, 4, 7, 8), "1-2, 4 and 7-8"),
        ((3,), "3"),
        ((), "none"),
    ],
)
def test_describe(layers: tuple[int, ...], words: str) -> None:
    assert describe_layers(layers) == words
