"""Rows, what may be said of them, and the picture: of numbers that are given here."""

from __future__ import annotations

import json
import statistics
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import matplotlib.image
import pytest

from hf_compress.cache.selection import Depth, Selection
from hf_compress.errors import ArgumentError
from hf_compress.report.study_arms import Arm
from hf_compress.report.study_picture import draw_study
from hf_compress.report.study_table import HEADINGS, Findings, Row, choose_metric, markdown, score_of, verdict, write_table

LITTLE = Selection(Depth(1), 10, "attention_no_sep", width=0.1, width_scheme="pca")
ABOUT = {
    "student_layers": 4,
    "max_length": 128,
    "dtype": "float16",
    "teacher": "my-bert",
    "examples": 3668,
    "tokens": 194_000,
    "command": "hf-compress study glue",
}


def row(name: str, scores: tuple[float, ...], share: float, *, part: Any = "joint", size: float = 1600.0, scheme: str = "joint") -> Row:
    chosen = {"none": None, "all": Selection.everything()}.get(name, LITTLE)
    arm = Arm(name, "ends" if name in ("none", "all") else part, scheme, chosen)
    return Row(arm, 1, share, share, size, dict(zip((42, 43, 44), scores, strict=False)))


NONE, ALL = row("none", (0.70, 0.72, 0.71), 0.0, size=56), row("all", (0.80, 0.82, 0.81), 0.8, size=40_000)
PART = row("1l_10t_0.1h", (0.79, 0.78, 0.80), 0.004)


def findings(*rows: Row, **more: Any) -> Findings:
    return Findings(
        tuple(rows), more.pop("metric", "accuracy"), more.pop("teacher", 0.84), more.pop("lines", {"majority": 0.684}), ABOUT, **more
    )


def test_a_verdict_where_everything_beats_nothing() -> None:
    lines = verdict(findings(NONE, ALL, PART))
    assert lines == [
        "Everything beats nothing by 10.00 (accuracy 81.00 ± 1.00 against 71.00 ± 1.00).",
        "1l_10t_0.1h (0.4% of the knowledge) keeps 80% (± 10) of what everything gains over none.",
    ]


@pytest.mark.parametrize(
    ("everything", "words"),
    [
        (row("all", (0.72, 0.73, 0.71), 1.0), "Everything does not beat nothing by two spreads"),  # 1 point at a spread of 1
        (row("all", (0.60, 0.62, 0.61), 1.0), "Everything does not beat nothing by two spreads"),
        (row("all", (0.70, 0.90, 0.80), 1.0), "Everything does not beat nothing by two spreads"),  # 9 points at a spread of 10
        (row("all", (0.9,), 1.0), "One seed has no spread"),
        (PART, "Without the arms none and all"),
    ],
)
def test_no_verdict_where_the_gain_is_lost_in_the_seeds(everything: Row, words: str) -> None:
    lines = verdict(findings(NONE, everything, PART))
    assert len(lines) == 1 and lines[0].startswith(words) and "keeps" not in lines[0]


def test_the_gain_must_be_two_of_the_larger_spread() -> None:
    just = row("all", (0.72, 0.74, 0.73), 1.0)  # 2 points, spreads of 1 point
    assert "keeps" in "".join(verdict(findings(NONE, replace(just, scores={42: 0.7201, 43: 0.7401, 44: 0.7301}), PART)))
    assert "keeps" not in "".join(verdict(findings(NONE, replace(just, scores={42: 0.7199, 43: 0.7399, 44: 0.7299}), PART)))


def test_an_error_is_better_when_it_is_lower() -> None:
    worse, better, part = row("none", (3.0, 3.1), 0.0), row("all", (1.0, 1.1), 0.8), row("1l_10t_0.1h", (1.5, 1.6), 0.004)
    assert "keeps 75%" in verdict(findings(worse, better, part, metric="mse"))[1]
    assert "keeps" not in "".join(verdict(findings(worse, better, part, metric="accuracy")))


def test_table_and_json_have_every_row(tmp_path: Path) -> None:
    found = findings(NONE, replace(ALL, arm=replace(ALL.arm, also=("4l-own",))), PART, failed=("2l, seed 42 (exit code 1)",), missing=2)
    page, content = write_table(found, tmp_path, "study.png")
    text = page.read_text()
    table = [tuple(cell.strip() for cell in line.strip("|").split(" | ")) for line in text.splitlines() if line.startswith("| ")]
    assert table[0] == HEADINGS
    assert table[3] == (
        "all (= 4l-own)",
        "all (layers of the map of the run)",
        "80%",
        "40,000",
        "81.00",
        "1.00",
        "3",
        "80.00, 82.00, 81.00",
    )
    assert table[4][0] == "1l_10t_0.1h" and table[4][2:] == ("0.4%", "1,600", "79.00", "1.00", "3", "79.00, 78.00, 80.00")
    assert "![score against share of the knowledge and bytes](study.png)" in text
    assert "the teacher 84.00, majority 68.40" in text and "D / (M + 1) * L / 128 * W" in text
    assert "2 runs are still to be done" in text and "Failed: 2l, seed 42 (exit code 1)" in text
    rows = json.loads(content.read_text())["rows"]
    assert [each["name"] for each in rows] == ["none", "all", "1l_10t_0.1h"]
    assert rows[2]["mean"] == pytest.approx(0.79) and rows[2]["spread"] == pytest.approx(statistics.stdev((0.79, 0.78, 0.80)))
    assert rows[2]["scores"] == {"42": 0.79, "43": 0.78, "44": 0.80} and rows[0]["selection"] is None
    assert Arm.from_json(rows[2]) == PART.arm


def test_scores_that_are_no_shares_stay_as_they_are() -> None:
    found = findings(row("none", (35.5, 36.5), 0.0), metric="bleu", teacher=None, lines={})
    assert "| 36.00 |" in markdown(found, "study.png") and "times 100" not in markdown(found, "study.png")


RESULTS: Mapping[str, Any] = {"epoch": 3.0, "eval_accuracy": 0.8, "eval_combined_score": 0.85, "eval_loss": 0.4, "eval_runtime": 3.0,
                              "eval_samples": 408, "eval_samples_per_second": 9.0, "eval_steps_per_second": 1.0}  # fmt: skip


def test_the_metric_is_the_first_that_is_one() -> None:
    assert choose_metric(RESULTS, None) == "accuracy"
    assert choose_metric(RESULTS, "eval_combined_score") == "combined_score"
    assert choose_metric(RESULTS, "loss") == "loss"
    assert score_of(RESULTS, "accuracy") == 0.8
    assert score_of({"eval_accuracy": float("nan")}, "accuracy") is None
    with pytest.raises(ArgumentError, match=r"no 'acuracy'\. Did you mean 'accuracy'\? It gave accuracy, combined_score\."):
        choose_metric(RESULTS, "acuracy")
    with pytest.raises(ArgumentError, match="gave no metric, only loss"):
        choose_metric({"eval_loss": 1.0}, None)


MANY = (
    NONE, ALL, PART,
    *(row(f"{tokens}t-{scheme}", (0.72 + tokens / 1000, 0.73 + tokens / 1000), tokens / 60, part="length", scheme=scheme, size=50 * tokens)
      for tokens in (5, 10, 20) for scheme in ("left_first", "attention")),
    *(row(f"{share}h-pca", (0.72 + share / 9, 0.73), share, part="width", scheme="pca", size=9000 * share) for share in (0.1, 0.5)),
    *(row(f"{layers}l-own", (0.74 + layers / 90, 0.73), layers / 5, part="depth", scheme="own", size=9000 * layers) for layers in (1, 2)),
)  # fmt: skip


@pytest.mark.parametrize("rows", [(NONE, ALL, PART), MANY, (NONE,), (row("1l", (0.6,), 0.2),)])
def test_the_picture_is_a_png_with_something_in_it(tmp_path: Path, rows: tuple[Row, ...]) -> None:
    path = tmp_path / "study.png"
    draw_study(findings(*rows), path)
    image = matplotlib.image.imread(path)
    assert image.shape[:2] == (1080, 2200)
    assert 0.005 < (image[..., :3].min(-1) < 0.9).mean() < 0.35
    other = tmp_path / "other.png"
    draw_study(findings(*(replace(each, scores={seed: 1 - score for seed, score in each.scores.items()}) for each in rows)), other)
    assert (matplotlib.image.imread(other) != image).any()  # the scores are in it
