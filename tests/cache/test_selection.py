"""Selection: the paper's tables, the short form and its errors, JSON, and what can be read out of a larger cache."""

from __future__ import annotations

import json
import random
import re
import subprocess
import sys
from dataclasses import replace
from typing import Any

import pytest

from hf_compress.cache.select import keeps_whole_states
from hf_compress.cache.selection import Depth, Selection, ranking_layer
from hf_compress.errors import ArgumentError, CacheError

# arXiv 2106.05691: teacher layers for student layers 0 to M, by M and scheme, of a teacher of 12.
PAPER = {
    (4, "t_top8"): (0, 2, 4, 6, 8),
    (4, "t_top10"): (0, 2, 5, 8, 10),
    (4, "t_top12"): (0, 3, 6, 9, 12),
    (6, "t_top8"): (0, 1, 3, 4, 5, 7, 8),
    (6, "t_top10"): (0, 2, 3, 5, 7, 8, 10),
    (6, "t_top12"): (0, 2, 4, 6, 8, 10, 12),
}


@pytest.mark.parametrize(("depth", "scheme"), PAPER)
def test_depth_is_the_papers_table(depth: int, scheme: Any) -> None:
    expected = tuple(enumerate(PAPER[depth, scheme]))
    assert Depth(scheme=scheme).layer_map_pairs(depth, 12) == expected
    for layers in range(1, depth + 2):
        assert Depth(layers, scheme).layer_map_pairs(depth, 12) == expected[depth + 1 - layers :]


@pytest.mark.parametrize(
    ("layers", "scheme", "expected"),
    [
        (6, "t_top8", 4),
        (6, "t_top10", 5),
        (6, "t_top12", 6),
        (24, "t_top8", 16),
        (24, "t_top10", 20),
        (24, "t_top12", 24),
        (3, "t_top10", 2),  # 2.5 to the even layer
        (9, "t_top10", 8),  # 7.5 to the even layer
        (1, "t_top8", 1),
    ],
)
def test_the_top_is_a_share_of_the_teachers_depth(layers: int, scheme: Any, expected: int) -> None:
    assert Depth(1, scheme).layer_map_pairs(1, layers) == ((1, expected),)


def test_depth_takes_the_top_of_pairs_and_of_the_runs_own_map() -> None:
    assert Depth(2, pairs=((3, 7), (1, 2), (2, 5))).layer_map_pairs(4, 12) == ((2, 5), (3, 7))
    assert Depth(pairs=((3, 7), (1, 2))).layer_map_pairs(4, 12) == ((1, 2), (3, 7))
    assert Depth(1).layer_map_pairs(2, 12, own=((2, 12), (1, 6))) == ((2, 12),)
    assert Depth().layer_map_pairs(2, 12, own=((2, 12), (1, 6))) == ((1, 6), (2, 12))


@pytest.mark.parametrize(
    ("depth", "student", "teacher", "words"),
    [
        (Depth(6, "t_top10"), 4, 12, "6l asks for 6 pairs of layers, but there are 5 .*: write 5l"),
        (Depth(3), 2, 12, "3l asks for 3 pairs .* are 2 .*write 2l"),
        (Depth(pairs=((5, 2),)), 4, 12, "pairs 5:2, but the student has 4 layers and the teacher 12"),
        (Depth(pairs=((4, 13),)), 4, 12, "pairs 4:13, but the student has 4 layers and the teacher 12"),
        (Depth(scheme="t_top8"), 7, 6, "at least as deep as the student, but the student has 7 layers and the teacher 6"),
    ],
)
def test_a_depth_that_the_models_do_not_have_is_refused(depth: Depth, student: int, teacher: int, words: str) -> None:
    with pytest.raises(ArgumentError, match=words):
        depth.layer_map_pairs(student, teacher, own=((1, 6), (2, 12)))


def test_the_runs_own_map_has_to_be_there() -> None:
    with pytest.raises(ArgumentError, match="own layer map, and there is none"):
        Depth(1).layer_map_pairs(4, 12)


@pytest.mark.parametrize(
    "arguments",
    [
        {"layers": 0},
        {"layers": True},
        {"layers": 1.0},
        {"scheme": "t_top9"},
        {"pairs": ()},
        {"pairs": ((1, 2), (1, 3))},
        {"pairs": ((1, -1),)},
        {"pairs": ((1, 2, 3),)},
        {"pairs": ((1, 2),), "layers": 2},
        {"pairs": ((1, 2),), "scheme": "t_top8"},
    ],
)
def test_a_bad_depth_is_refused(arguments: dict[str, Any]) -> None:
    with pytest.raises(ArgumentError):
        Depth(**arguments)


def test_parse_fills_in_the_defaults() -> None:
    assert Selection.parse("1l_10t_0.1h") == Selection(Depth(1), 10, "attention_no_sep", "probabilities", 0.1, "pca", "ignore", 0)
    assert Selection.parse("10t") == Selection(Depth(), 10, "attention_no_sep")
    assert Selection.parse("1l") == Selection(Depth(1))
    assert Selection.parse(" .1H ") == Selection(width=0.1, width_scheme="pca")
    assert Selection.parse("all") == Selection() == Selection.everything()
    assert Selection.parse("1l_50t_1.0h", width_scheme="magnitude") == Selection(Depth(1), 50, "attention_no_sep")
    chosen = Selection.parse(
        "2l_30t_0.2h", scheme="t_top8", length="attention", rank_by="scores", width_scheme="magnitude", mask="zero_target", seed=3
    )
    assert chosen == Selection(Depth(2, "t_top8"), 30, "attention", "scores", 0.2, "magnitude", "zero_target", 3)


@pytest.mark.parametrize("text", ["1l_10t_0.1h", "10t", "1l", "0.1h", "2l_0.25h", "all", "0.00001h", "0.30000000000000004h", "5l_1t"])
def test_the_short_form_comes_back(text: str) -> None:
    assert str(Selection.parse(text)) == text


@pytest.mark.parametrize(
    ("text", "nearest"),
    [
        ("", "1l_10t_0.1h"),
        ("everything", "1l_10t_0.1h"),
        ("0l", "1l"),
        ("1.6l", "2l"),
        ("0t_0.1h", "1t_0.1h"),
        ("-3t", "3t"),
        ("10h", "0.1h"),
        ("1.5h", "1.0h"),
        ("0h", "0.1h"),
        ("10%", "0.1h"),
        ("1l_10t_0.1", "1l_10t_0.1h"),
        ("1l-10t-0.1h", "1l_10t_0.1h"),
        ("1l10t", "1l_10t"),
        ("10t_1l", "1l_10t"),
        ("1l_1l", "1l"),
        ("1 layer, 10 tokens", "1l_10t"),
        ("1l_", "1l"),
        ("1l_all", "1l"),
        ("nanh", "1l_10t_0.1h"),
    ],
)
def test_what_is_no_short_form_is_refused_with_the_nearest(text: str, nearest: str) -> None:
    with pytest.raises(ArgumentError) as error:
        Selection.parse(text, flag="hsk")
    assert str(error.value).startswith(f"--hsk: {text!r} is no selection: ")
    assert f". Write {nearest}, or all for everything." in str(error.value)


def test_the_nearest_form_is_always_valid() -> None:
    refused = 0
    for _ in range(3000):
        text = "".join(random.choices("0123456789.%_lth -", k=random.randint(1, 12)))
        try:
            selection = Selection.parse(text)
        except ArgumentError as error:
            refused += 1
            Selection.parse(str(error).rpartition(" Write ")[2].partition(",")[0])
        else:
            assert Selection.parse(str(selection)) == selection
    assert refused > 1000


@pytest.mark.parametrize(
    ("text", "choices", "words"),
    [
        ("1l", {"length": "attention"}, "'attention', but '1l' has no number of tokens: add 10t"),
        ("10t", {"width_scheme": "pca"}, "'pca', but '10t' has no share of dimensions: add 0.1h"),
        ("10t", {"length": "all"}, "The length scheme is 'all' and the number of tokens 10"),
        ("0.1h", {"width_scheme": "all"}, "The width scheme is 'all' and the width 0.1"),
        ("10t", {"length": "atention"}, "no length scheme 'atention'. Did you mean 'attention'"),
        ("10t", {"rank_by": "logits"}, "no ranking 'logits'"),
        ("0.1h", {"width_scheme": "magnitud"}, "Did you mean 'magnitude'"),
        ("0.1h", {"mask": "zero"}, "reading of the mask 'zero'. Did you mean 'zero_target'"),
        ("1l", {"scheme": "t_top9"}, "no depth scheme 't_top9'"),
        ("1l", {"seed": -1}, "seed is -1"),
    ],
)
def test_choices_that_do_not_fit_are_refused(text: str, choices: dict[str, Any], words: str) -> None:
    with pytest.raises(ArgumentError) as error:
        Selection.parse(text, **choices)
    assert words in str(error.value)


@pytest.mark.parametrize(
    "arguments",
    [
        {"tokens": 0, "length": "attention"},
        {"tokens": 10},
        {"length": "attention"},
        {"width": 0.0, "width_scheme": "pca"},
        {"width": 1.5, "width_scheme": "pca"},
        {"width": float("nan"), "width_scheme": "pca"},
        {"width": True},
        {"width": "0.1", "width_scheme": "pca"},
        {"width": 0.1},
        {"width_scheme": "pca"},
        {"seed": 2**32},
        {"seed": 1.0},
    ],
)
def test_a_bad_selection_is_refused(arguments: dict[str, Any]) -> None:
    with pytest.raises(ArgumentError):
        Selection(**arguments)


def test_counts_are_cut_off_as_in_the_papers_code() -> None:
    tenth = Selection.parse("10t_0.1h")
    assert [tenth.num_dimensions(size) for size in (768, 312, 5)] == [76, 31, 1]
    assert Selection.parse("0.29h").num_dimensions(100) == 28  # 0.29 * 100 is 28.999999999999996
    assert Selection.everything().num_dimensions(768) == 768
    assert [tenth.num_entries(tokens, 768) for tokens in (10, 3, 0)] == [768, 230, 0]
    assert tenth.num_entries(1, 4) == 1


def random_selection() -> Selection:
    tokens = random.choice([None, random.randint(1, 128)])
    width = random.choice([1.0, random.random() or 0.5])
    pairs = tuple((student, random.randint(0, 12)) for student in random.sample(range(7), random.randint(1, 5)))
    depth = random.choice([Depth(), Depth(random.randint(1, 7), random.choice(["t_top8", "t_top10", "t_top12", None])), Depth(pairs=pairs)])
    return Selection(
        depth=depth,
        tokens=tokens,
        length="all" if tokens is None else random.choice(["left_first", "attention", "attention_no_sep"]),
        rank_by=random.choice(["probabilities", "scores"]),
        width=width,
        width_scheme="all" if width == 1 else random.choice(["random", "uniform", "magnitude", "pca"]),
        mask=random.choice(["zero_target", "ignore"]),
        seed=random.randrange(2**32),
    )


def test_json_gives_the_same_selection_back() -> None:
    for _ in range(200):
        selection = random_selection()
        text = json.dumps(selection.to_json(), allow_nan=False)
        assert Selection.from_json(json.loads(text)) == selection
        assert json.dumps(Selection.from_json(json.loads(text)).to_json()) == text


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"tokens": "10"}, "number of tokens is '10'"),
        ({"tokens": -1}, "number of tokens is -1"),
        ({"length": ["attention"]}, "length scheme"),
        ({"width": None}, "width is None"),
        ({"seed": 0.5}, "seed is 0.5"),
        ({"more": 1}, "selection holds .*more.*; expected the entries depth, "),
        ({"depth": None}, "selection.depth holds None"),
        ({"depth": {"layers": 1}}, "selection.depth holds layers; expected the entries layers, pairs, scheme"),
        ({"depth": {"layers": True, "scheme": None, "pairs": None}}, "number of layers is True"),
        ({"depth": {"layers": None, "scheme": {}, "pairs": None}}, "no depth scheme"),
        ({"depth": {"layers": None, "scheme": None, "pairs": 5}}, "not valid"),
        ({"depth": {"layers": None, "scheme": None, "pairs": [5]}}, "not valid"),
        ({"depth": {"layers": None, "scheme": None, "pairs": ["ab"]}}, "pairs"),
    ],
)
def test_json_that_is_no_selection_is_a_cache_error(change: dict[str, Any], words: str) -> None:
    good = Selection.parse("1l_10t_0.1h").to_json()
    with pytest.raises(CacheError, match=words):
        Selection.from_json({**good, **change})
    with pytest.raises(CacheError):
        Selection.from_json({name: value for name, value in good.items() if name not in change} if set(change) <= set(good) else None)


LARGE = Selection.parse("30t_0.5h", length="attention", width_scheme="random")


def reason(asked: Selection, stored: Selection, importance: Any = ()) -> str | None:
    return asked.within(stored, layers=[8, 10], stored_layers=(10, 8, 5), importance=importance)


@pytest.mark.parametrize(
    ("asked", "stored"),
    [
        (LARGE, LARGE),
        (Selection.everything(), Selection.everything()),
        (replace(LARGE, tokens=10), LARGE),
        (replace(LARGE, width=0.1), LARGE),
        (replace(LARGE, mask="zero_target"), LARGE),
        (replace(LARGE, depth=Depth(2, "t_top8")), LARGE),  # what counts is which layers are there
        (replace(LARGE, length="left_first", tokens=7), replace(LARGE, length="left_first")),
        (replace(LARGE, length="left_first"), Selection.everything()),
        (replace(LARGE, length="left_first", rank_by="scores", tokens=5), replace(LARGE, length="left_first")),
        (replace(LARGE, tokens=3, length="attention_no_sep"), replace(LARGE, tokens=9, length="attention_no_sep")),
        (replace(LARGE, width_scheme="uniform"), replace(LARGE, width_scheme="uniform", tokens=None, length="all", seed=1)),
        (replace(LARGE, width_scheme="pca", width=0.2), replace(LARGE, width_scheme="pca")),
        (replace(LARGE, width_scheme="magnitude", width=0.2), replace(LARGE, width_scheme="magnitude")),
        (replace(LARGE, width_scheme="magnitude", width=0.2), replace(LARGE, width_scheme="all", width=1)),
    ],
)
def test_what_can_be_read_out_of_a_larger_cache(asked: Selection, stored: Selection) -> None:
    assert reason(asked, stored, importance=() if stored.tokens else ["probabilities"]) is None


@pytest.mark.parametrize(
    ("asked", "stored", "words"),
    [
        (Selection.everything(), Selection.parse("10t"), "it holds 10 tokens an example, not all"),
        (replace(LARGE, tokens=31), LARGE, "it holds 30 tokens an example, not 31"),
        (replace(LARGE, length="left_first"), LARGE, "chosen by attention, not left_first"),
        (replace(LARGE, length="attention_no_sep"), LARGE, "chosen by attention, not attention_no_sep"),
        (replace(LARGE, rank_by="scores"), LARGE, "ranked by probabilities, not scores"),
        (LARGE, Selection.everything(), "it holds all tokens, but not their probabilities, by which attention ranks them"),
        (replace(LARGE, width=1.0, width_scheme="all"), LARGE, r"it holds 0.5 of the dimensions \(random\), not all"),
        (replace(LARGE, width=0.6), LARGE, "it holds 0.5 of the dimensions, not 0.6"),
        (replace(LARGE, width_scheme="pca"), LARGE, "chosen by random, not pca"),
        (replace(LARGE, seed=1), LARGE, "random dimensions come from seed 0, not 1"),
        (replace(LARGE, width_scheme="pca", seed=1), replace(LARGE, width_scheme="pca"), "pca dimensions come from seed 0, not 1"),
        (replace(LARGE, width_scheme="uniform", width=0.25), replace(LARGE, width_scheme="uniform"), "those of 0.25 are not among them"),
        (
            replace(LARGE, width_scheme="magnitude", tokens=10),
            replace(LARGE, width_scheme="magnitude"),
            "those of 30 tokens together, not of 10",
        ),
    ],
)
def test_what_cannot_be_read_says_why(asked: Selection, stored: Selection, words: str) -> None:
    found = reason(asked, stored)
    assert found is not None
    assert re.search(words, found)


def test_layers_that_are_not_stored_are_named() -> None:
    found = Selection.everything().within(Selection.everything(), layers=(4, 8, 2), stored_layers=(8, 10))
    assert found == "it does not hold teacher layer 2, 4; it holds 8, 10"
    needs = Selection.parse("5t", rank_by="scores")
    assert needs.within(Selection(), layers=(8,), stored_layers=(8,), importance=["probabilities"]) is not None
    assert needs.within(Selection(), layers=(8,), stored_layers=(8,), importance=["scores"]) is None


def test_describe_names_the_schemes() -> None:
    assert Selection.parse("1l_10t_0.1h", scheme="t_top10").describe() == (
        "1l_10t_0.1h (layers t_top10; tokens attention_no_sep, by probabilities; dimensions pca, ignore)"
    )
    assert Selection(Depth(pairs=((2, 8), (1, 4))), 5, "left_first").describe() == "2l_5t (layers 1:4,2:8; tokens left_first)"
    assert Selection.everything().describe() == "all (layers of the map of the run)"


def test_properties() -> None:
    assert keeps_whole_states(Selection.parse("1l"))
    assert not keeps_whole_states(Selection.parse("10t"))
    assert not keeps_whole_states(Selection.parse("0.1h"))
    assert [Selection.parse("1t", length=scheme).needs_importance for scheme in ("left_first", "attention", "attention_no_sep")] == [
        False,
        True,
        True,
    ]
    assert [ranking_layer(layer) for layer in (0, 1, 12)] == [1, 1, 12]


def test_no_torch_is_loaded() -> None:
    code = "import sys, hf_compress.cache.selection; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], timeout=60).returncode == 0
