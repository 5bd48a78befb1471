"""What a study found: a row an arm, in Markdown and JSON; and how much of the gain an arm keeps, where there is a gain. No torch here."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hf_compress.argument_values import nearest_name
from hf_compress.cache.files import write_atomic
from hf_compress.errors import ArgumentError
from hf_compress.report.study_arms import ALL, NONE, Arm

# Evaluation writes these beside the metrics.
_NO_METRIC = ("loss", "runtime", "samples", "epoch", "samples_per_second", "steps_per_second", "model_preparation_time")
_LOWER_IS_BETTER = ("loss", "error", "mse", "rmse", "mae", "perplexity", "wer", "cer")
HEADINGS = ("arm", "what is compared", "share of the knowledge", "bytes an example", "mean", "spread", "seeds", "scores")
# A gain counts where it is at least so many spreads.
SPREADS = 2


@dataclass(frozen=True)
class Row:
    """What was measured of one arm.

    Attributes:
        arm: which.
        pairs: how many pairs of layers are compared.
        share: of the numbers that could be compared, from 0 to 1.
        paper_share: as the MUD paper counts it: D / (M + 1) * L / (longest example) * W.
        bytes: an example, on disk.
        scores: by seed.
    """

    arm: Arm
    pairs: int
    share: float
    paper_share: float
    bytes: float
    scores: Mapping[int, float]

    @property
    def mean(self) -> float:
        """Over seeds."""
        return statistics.fmean(self.scores.values())

    @property
    def spread(self) -> float | None:
        """Standard deviation over seeds (of a sample, n - 1); None of one seed."""
        return statistics.stdev(self.scores.values()) if len(self.scores) > 1 else None


@dataclass(frozen=True)
class Findings:
    """What a study found.

    Attributes:
        rows: in the order of the arms.
        metric: without "eval_".
        teacher: its own score; None where it is not known.
        lines: more scores to compare with, by name, as the user gave them.
        about: facts for study.json: command, teacher, data.
        exact: whether tokens were counted example by example.
        failed: the runs that failed, in words.
        missing: how many runs are still to be done.
    """

    rows: tuple[Row, ...]
    metric: str
    teacher: float | None
    lines: Mapping[str, float]
    about: Mapping[str, Any]
    exact: bool = True
    failed: tuple[str, ...] = ()
    missing: int = 0

    @property
    def factor(self) -> int:
        """100 where scores are shares or correlations, from -1 to 1; else 1."""
        found = [score for row in self.rows for score in row.scores.values()]
        return 100 if all(-1 <= score <= 1 for score in found) else 1

    def row(self, name: str) -> Row | None:
        """The row of an arm, by any of its names."""
        return next((row for row in self.rows if name in (row.arm.name, *row.arm.also)), None)

    def shown(self, score: float) -> str:
        """A score as it is printed."""
        return f"{self.factor * score:.2f}"


def choose_metric(results: Mapping[str, Any], asked: str | None) -> str:
    """The metric that a study compares.

    Args:
        results: of one evaluation: `eval_accuracy` and so on.
        asked: by the user; with or without "eval_".

    Raises:
        ArgumentError: it is not among the results, or there is none; with those that are.
    """
    found = [name.removeprefix("eval_") for name, value in results.items() if name.startswith("eval_") and isinstance(value, int | float)]
    known = [name for name in found if not any(name == other or name.endswith(f"_{other}") for other in _NO_METRIC)]
    if asked is None:
        if not known:
            raise ArgumentError(
                f"The evaluation gave no metric, only {', '.join(found) or 'nothing'}: does the script give its Trainer a compute_metrics? "
                "--metric loss compares the loss."
            )
        return known[0]
    name = asked.removeprefix("eval_")
    if name not in found:
        raise ArgumentError(f"--metric: the evaluation gave no '{asked}'.{nearest_name(name, found)} It gave {', '.join(known or found)}.")
    return name


def lower_is_better(metric: str) -> bool:
    """Whether a metric is an error."""
    return bool(set(metric.lower().split("_")) & set(_LOWER_IS_BETTER))


def score_of(results: Mapping[str, Any] | None, metric: str) -> float | None:
    """A run's score; None where it has none, or not a number."""
    value = None if results is None else results.get(f"eval_{metric}")
    return float(value) if isinstance(value, int | float) and math.isfinite(value) else None


def verdict(findings: Findings) -> list[str]:
    """What may be said of how much is enough, a sentence each.

    Only where everything beats nothing by two spreads is a share of that gain a number worth reading.
    """
    none, everything = findings.row(NONE), findings.row(ALL)
    if none is None or everything is None:
        return ["Without the arms none and all (--study_parts ends) nothing says what everything is worth, so no share of it is told."]
    if none.spread is None or everything.spread is None:
        return ["One seed has no spread, so nothing is said about how much is enough: give several, as in --seeds 42,43,44."]
    sign = -1 if lower_is_better(findings.metric) else 1
    gain, spread = sign * (everything.mean - none.mean), max(none.spread, everything.spread)
    ends = f"{_with_spread(findings, everything)} against {_with_spread(findings, none)}"
    if gain <= 0 or gain < SPREADS * spread:
        return [
            f"Everything does not beat nothing by two spreads ({findings.metric} {ends}), so this study says nothing about how much is "
            "enough."
        ]
    lines = [f"Everything beats nothing by {findings.factor * gain:.2f} ({findings.metric} {ends})."]
    for row in sorted(findings.rows, key=lambda row: row.share):
        if row.arm.name in (NONE, ALL):
            continue
        kept = sign * (row.mean - none.mean) / gain
        give_or_take = "" if row.spread is None else f" (± {100 * row.spread / gain:.0f})"
        lines.append(
            f"{row.arm.name} ({100 * row.share:.2g}% of the knowledge) keeps {100 * kept:.0f}%{give_or_take} of what everything gains over "
            "none."
        )
    return lines


def _with_spread(findings: Findings, row: Row) -> str:
    return f"{findings.shown(row.mean)} ± {findings.factor * (row.spread or 0.0):.2f}"


def cells_of(findings: Findings, row: Row) -> tuple[str, ...]:
    """A row as it is printed; one for each of `HEADINGS`."""
    also = f" (= {', '.join(row.arm.also)})" if row.arm.also else ""
    return (
        f"{row.arm.name}{also}",
        row.arm.describe(),
        f"{100 * row.share:.3g}%",
        f"{row.bytes:,.0f}",
        findings.shown(row.mean),
        "" if row.spread is None else f"{findings.factor * row.spread:.2f}",
        str(len(row.scores)),
        ", ".join(findings.shown(score) for _, score in sorted(row.scores.items())),
    )


def markdown(findings: Findings, picture: str) -> str:
    """study.md: the verdict, the table, the picture, and how it was counted."""
    layers, longest = findings.about["student_layers"], findings.about["max_length"]
    known = [("the teacher", findings.teacher), *findings.lines.items()]
    beside = [f"{name} {findings.shown(score)}" for name, score in known if score is not None]
    times = ", times 100" if findings.factor == 100 else ""
    numbers = "counted over all training examples" if findings.exact else "with the mean length for every example"
    table = [HEADINGS, ("---", "---", *(["---:"] * 5), "---"), *(cells_of(findings, row) for row in findings.rows)]
    return "\n".join(
        [
            "# How much of the teacher is worth how much",
            "",
            *(f"- {line}" for line in verdict(findings)),
            "",
            f"Scores are {findings.metric}{times}, on the evaluation data; spread is the standard deviation over seeds (n - 1)."
            + (f" Beside them: {', '.join(beside)}." if beside else ""),
            *([f"**{findings.missing} runs are still to be done.**"] if findings.missing else []),
            *(f"**Failed: {each}.**" for each in findings.failed),
            "",
            *(f"| {' | '.join(cells)} |" for cells in table),
            "",
            f"![score against share of the knowledge and bytes]({picture})",
            "",
            "**Share of the knowledge**: numbers of hidden states that are compared / all that a student of "
            f"{layers} layers could be compared with: {layers} + 1 layers (the embedding output is one) x all tokens of the training "
            f"examples x all dimensions; {numbers}. Examples with fewer tokens than an arm takes give those that they have. The paper "
            f"(arXiv 2106.05691) counts D / (M + 1) * L / {longest} * W, with D pairs of layers, M = {layers}, L tokens and the share W of "
            "the dimensions; study.json has both.",
            "",
            f"**Bytes an example**: what a teacher on disk takes, as {findings.about['dtype']}, that holds what the arm reads, no more: "
            "with the predictions, the place in the index, and its part of what all examples share. All arms here read one larger cache.",
            "",
            "All arms have the same script, student, data, epochs and learning rate; `none` spends all epochs on the predictions. "
            f"Teacher: {findings.about['teacher']}. Data: {findings.about['examples']:,} training examples, {findings.about['tokens']:,} "
            "tokens.",
            "",
            "```",
            findings.about["command"],
            "```",
            "",
        ]
    )


def to_json(findings: Findings) -> dict[str, Any]:
    """study.json: everything, with all digits."""
    rows = [
        {
            **row.arm.to_json(),
            "describe": row.arm.describe(),
            "pairs": row.pairs,
            "share": row.share,
            "paper_share": row.paper_share,
            "bytes_an_example": row.bytes,
            "mean": row.mean,
            "spread": row.spread,
            "scores": {str(seed): score for seed, score in sorted(row.scores.items())},
        }
        for row in findings.rows
    ]
    return {
        "metric": findings.metric,
        "lower_is_better": lower_is_better(findings.metric),
        "verdict": verdict(findings),
        "teacher_score": findings.teacher,
        "lines": dict(findings.lines),
        "rows": rows,
        "failed": list(findings.failed),
        "missing": findings.missing,
        "tokens_counted": findings.exact,
        **findings.about,
    }


def write_table(findings: Findings, folder: Path, picture: str) -> tuple[Path, Path]:
    """Write study.md and study.json, each as a whole."""
    page, content = folder / "study.md", folder / "study.json"
    write_atomic(page, markdown(findings, picture).encode())
    write_atomic(content, (json.dumps(to_json(findings), indent=1) + "\n").encode())
    return page, content
