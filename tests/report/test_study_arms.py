"""Which arms a study has, and what `hf-compress run` makes of their flags."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from hf_compress.cache.selection import Depth, Selection
from hf_compress.errors import ArgumentError
from hf_compress.report.study_arms import (
    JOINT,
    PARTS,
    Arm,
    Choices,
    Layers,
    planned_arms,
    read_arms,
    read_counts,
    read_parts,
    read_schemes,
    read_shares,
)
from hf_compress.script_arguments import parse_command_line

# MUD's own case: BERT-base and a student of four layers, with the uniform map of the recipe.
PAPER = Layers(4, 12, ((1, 3), (2, 6), (3, 9), (4, 12)))
EVERYTHING = Choices(parts=PARTS, arms=("2l_20t_0.5h", "none", "all"))


def named(choices: Choices, layers: Layers = PAPER) -> dict[str, Arm]:
    return {arm.name: arm for arm in planned_arms(choices, layers)}


def test_the_ends_and_the_papers_joint_arms_are_what_is_compared_by_default() -> None:
    assert list(named(Choices())) == ["none", "all", *JOINT]


def test_every_part() -> None:
    arms = named(EVERYTHING)
    assert len(arms) == 2 + (3 + 3 * 5 - 4) + 3 * 4 + 4 * 4 + 5 + 1
    assert arms["3l-t_top10"].selection == Selection(depth=Depth(3, "t_top10"))
    assert arms["20t-attention"].selection == Selection(tokens=20, length="attention")
    assert arms["0.05h-magnitude"].selection == Selection(width=0.05, width_scheme="magnitude")
    assert arms["2l_20t_0.5h"].selection == Selection(Depth(2), 20, "attention_no_sep", width=0.5, width_scheme="pca")
    assert arms["1l_50t_1.0h"].selection == Selection(Depth(1), 50, "attention_no_sep")


def test_what_is_the_same_is_trained_once() -> None:
    """The paper's uniform map is t_top12 without the embedding output; four layers of it are everything."""
    arms = named(Choices(parts=("ends", "depth"), schemes=("own", "t_top12")))
    assert arms["all"].also == ("4l-own", "4l-t_top12")
    assert arms["1l-own"].also == ("1l-t_top12",)
    assert list(arms) == ["none", "all", "1l-own", "2l-own", "3l-own", "5l-t_top12"]


def test_depths_are_counted_in_the_pairs_of_the_run() -> None:
    arms = named(Choices(parts=("depth",), schemes=("own", "t_top8"), layers=(1, 2)), Layers(2, 6, ((1, 1), (2, 5))))
    assert [PAPER.pairs(None), *(Layers(2, 6, ((1, 1), (2, 5))).pairs(arm.selection) for arm in arms.values())] == [
        (), ((2, 5),), ((1, 1), (2, 5)), ((2, 4),), ((1, 2), (2, 4))
    ]  # fmt: skip
    with pytest.raises(ArgumentError, match="3l asks for 3 pairs of layers, but there are 2"):
        named(Choices(parts=("depth",), layers=(3,)), Layers(2, 6, ((1, 1), (2, 5))))


@pytest.mark.parametrize(
    "choices",
    [
        EVERYTHING,
        replace(EVERYTHING, rank_by="scores", mask="zero_target", joint_layers="t_top8", joint_length="attention", joint_width="magnitude"),
    ],
)
def test_a_run_reads_from_an_arms_flags_the_selection_that_was_meant(choices: Choices) -> None:
    for arm in planned_arms(choices, PAPER):
        read = parse_command_line(["glue", "--teacher_cache_dir", "cache", *arm.flags()]).compression.selection
        expected = arm.selection
        if expected is not None and read is not None and not expected.needs_importance:
            expected = replace(expected, rank_by=read.rank_by)  # says nothing there
        assert read == expected
        assert Arm.from_json(arm.to_json()) == arm


def test_schemes_that_are_not_the_default_stand_in_the_name() -> None:
    choices = Choices(
        parts=("width", "length"), tokens=(5,), shares=(0.1,), schemes=("attention", "magnitude"), rank_by="scores", mask="zero_target"
    )
    assert list(named(choices)) == ["5t-attention-scores", "0.1h-magnitude-zero_target"]
    joint = Choices(parts=(), arms=("1l_5t_0.1h",), joint_layers="t_top8", joint_width="magnitude")
    assert list(named(joint)) == ["1l_5t_0.1h-t_top8-magnitude"]


@pytest.mark.parametrize(
    ("read", "text", "words"),
    [
        (read_parts, "ends,detph", "--study_parts: there is no 'detph'. Did you mean 'depth'?"),
        (read_parts, " , ", "--study_parts is empty"),
        (read_schemes, "atention", "--study_schemes: there is no 'atention'. Did you mean 'attention'?"),
        (read_shares, "0.1,1", "--study_shares: '1' is no share of the dimensions"),
        (lambda text: read_counts(text, "seeds", 0), "42,x", "--seeds: 'x' is no whole number from 0 up"),
        (lambda text: read_counts(text, "study_tokens"), "0", "--study_tokens: '0' is no whole number from 1 up"),
        (lambda text: planned_arms(Choices(parts=(), arms=read_arms(text)), PAPER), "1l_10t_10%", "is no selection.*Write 1l_10t_0.1h"),
        (lambda text: planned_arms(Choices(parts=(), arms=read_arms(text)), PAPER), "6l", "6l asks for 6 pairs of layers, but there are 4"),
    ],
)
def test_what_cannot_be_read(read: Any, text: str, words: str) -> None:
    with pytest.raises(ArgumentError, match=words):
        read(text)


def test_numbers_are_taken_once_and_in_order() -> None:
    assert read_counts("44,42,44", "seeds") == (44, 42)
    assert read_parts("joint,ends") == ("ends", "joint")
    assert read_shares("0.5,0.05") == (0.5, 0.05)
