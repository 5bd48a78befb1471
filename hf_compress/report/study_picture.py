"""The study's picture: scores against the share of the teacher's knowledge, and against bytes on disk, with bars for the seeds' spread.

Arms of one scheme are one curve; what has no amount (none, all, the teacher) is a line across, named at its right end.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patheffects import withStroke
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

from hf_compress.report.study_arms import ALL, DEPTHS, LENGTHS, NONE, WIDTHS, Part
from hf_compress.report.study_table import Findings, Row, lower_is_better

INK, FAINT = "#2b2b33", "#8b8b96"
# A part has a colour, its schemes go from light to dark.
COLOURS: dict[Part, tuple[str, ...]] = {
    "joint": ("#14796b",),
    "depth": ("#9db7dd", "#6c92c9", "#3f6db3", "#234a86"),
    "length": ("#ecb877", "#d98a2b", "#a35c0c"),
    "width": ("#d6a3c8", "#bf72ab", "#994585", "#6b2a5c"),
}
SCHEMES: dict[Part, tuple[str, ...]] = {"joint": ("joint",), "depth": DEPTHS, "length": LENGTHS, "width": WIDTHS}
MARKERS = {"joint": "o", "depth": "s", "length": "^", "width": "D"}
LINE_COLOURS = {NONE: "#b3433a", ALL: "#14796b"}
_APART = 0.042  # of the height, between two names at the right
SHARES = tuple(digit * 10.0**power for power in range(-6, 1) for digit in (1, 3))
BYTES = tuple(digit * 10.0**power for power in range(1, 9) for digit in (1, 3))


@dataclass(frozen=True)
class _Line:
    """A score without an amount."""

    name: str
    score: float
    colour: str
    spread: float | None = None


def draw_study(findings: Findings, path: Path) -> None:
    """Write the picture as a PNG of 2200 x 1080 pixels.

    Args:
        findings: with one row at least.
        path: of the file.
    """
    figure = Figure(figsize=(11, 5.4), dpi=200, facecolor="white")
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2, sharey=True)
    figure.subplots_adjust(left=0.065, right=0.87, top=0.9, bottom=0.235, wspace=0.05)
    lines = _lines(findings)
    _lay_out(left, findings, lines, SHARES, lambda row: row.share, _as_share)
    _lay_out(right, findings, lines, BYTES, lambda row: row.bytes, _as_bytes)
    left.set_ylabel(f"{findings.metric}{' (x 100)' if findings.factor == 100 else ''}", color=INK)
    left.set_xlabel("share of the teacher's hidden states that is compared (log scale)", color=INK)
    right.set_xlabel("bytes an example on disk (log scale)", color=INK)
    for axes, amount in ((left, lambda row: row.share), (right, lambda row: row.bytes)):
        for rows in _curves(findings.rows):
            _curve(axes, findings, rows, amount)
        _name_joint(axes, findings, amount)
        _ends(axes, findings, amount)
    _name_lines(right, findings, lines)
    seeds = sorted({seed for row in findings.rows for seed in row.scores})
    bars = ", bars: one standard deviation" if len(seeds) > 1 else ""
    figure.suptitle(
        f"How much of the teacher is worth how much: {findings.metric} over {_plural(len(seeds), 'seed')}{bars}",
        x=0.065,
        ha="left",
        y=0.975,
        color=INK,
        fontsize=13,
    )
    handles, names = left.get_legend_handles_labels()
    if handles:
        figure.legend(handles, names, loc="upper left", bbox_to_anchor=(0.055, 0.135), ncols=7, frameon=False, fontsize=8.5, labelcolor=INK)
    figure.savefig(path)


def _curves(rows: Iterable[Row]) -> list[list[Row]]:
    """Rows of one part and scheme, by rising share."""
    found: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        if row.arm.part != "ends":
            found.setdefault((row.arm.part, row.arm.scheme), []).append(row)
    return [sorted(curve, key=lambda row: (row.share, row.bytes)) for curve in found.values()]


def _lines(findings: Findings) -> list[_Line]:
    lines = [_Line(name, score, FAINT) for name, score in (("teacher", findings.teacher), *findings.lines.items()) if score is not None]
    for name, words in ((NONE, "none"), (ALL, "all")):
        if (row := findings.row(name)) is not None:
            lines.append(_Line(words, row.mean, LINE_COLOURS[name], row.spread))
    return lines


def _lay_out(
    axes: Axes,
    findings: Findings,
    lines: Sequence[_Line],
    ticks: Sequence[float],
    amount: Callable[[Row], float],
    written: Callable[[float], str],
) -> None:
    amounts = [amount(row) for row in findings.rows if amount(row) > 0] or [1.0]
    factor = findings.factor
    scores = [factor * (row.mean + side * (row.spread or 0.0)) for row in findings.rows for side in (-1, 1)]
    scores += [factor * line.score for line in lines]
    margin = 0.08 * (max(scores) - min(scores)) or 1.0
    axes.set_xscale("log")
    axes.set_xlim(min(amounts) / 1.7, max(amounts) * 1.7)
    axes.set_ylim(min(scores) - margin, max(scores) + margin)
    if lower_is_better(findings.metric):
        axes.set_title("lower is better", loc="right", color=FAINT, fontsize=9)
    axes.xaxis.set_major_locator(FixedLocator(ticks))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: written(value)))
    axes.grid(axis="both", color="#ececf1", linewidth=0.8)
    axes.tick_params(colors=FAINT, length=0, labelsize=9)
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    axes.spines["bottom"].set_color("#c9c9d2")
    axes.set_axisbelow(True)
    for line in lines:
        if line.spread:
            axes.axhspan(
                factor * (line.score - line.spread), factor * (line.score + line.spread), color=line.colour, alpha=0.08, linewidth=0
            )
        axes.axhline(factor * line.score, color=line.colour, linestyle=(0, (2, 3)), linewidth=1.1, zorder=1)


def _curve(axes: Axes, findings: Findings, rows: Sequence[Row], amount: Callable[[Row], float]) -> None:
    part, scheme = rows[0].arm.part, rows[0].arm.scheme
    colours, schemes = COLOURS[part], SCHEMES[part]
    axes.errorbar(
        [amount(row) for row in rows],
        [findings.factor * row.mean for row in rows],
        yerr=[findings.factor * (row.spread or 0.0) for row in rows],
        color=colours[schemes.index(scheme) % len(colours)],
        marker=MARKERS[part],
        markersize=6.5 if part == "joint" else 5,
        markeredgecolor="white",
        markeredgewidth=0.8,
        linewidth=1.8 if part == "joint" else 1.2,
        elinewidth=1.0,
        capsize=2.5,
        label="joint" if part == "joint" else f"{part}: {scheme}",
        zorder=4 if part == "joint" else 3,
    )


def _name_joint(axes: Axes, findings: Findings, amount: Callable[[Row], float]) -> None:
    """The joint arms are named at their points, above and below in turn, so that neighbours stay apart."""
    joint = sorted((row for row in findings.rows if row.arm.part == "joint"), key=amount)
    for number, row in enumerate(joint):
        above = number % 2 == 0
        reach = findings.factor * (row.spread or 0.0)
        axes.annotate(
            row.arm.name,
            (amount(row), findings.factor * row.mean + (reach if above else -reach)),
            xytext=(0, 5 if above else -5),
            textcoords="offset points",
            ha="center",
            va="bottom" if above else "top",
            color=COLOURS["joint"][0],
            fontsize=7.5,
            zorder=5,
            path_effects=[withStroke(linewidth=2.2, foreground="white")],
        )


def _ends(axes: Axes, findings: Findings, amount: Callable[[Row], float]) -> None:
    """Where nothing and everything stand on their lines; nothing has no place on the scale of shares."""
    for name, colour in LINE_COLOURS.items():
        row = findings.row(name)
        if row is not None and amount(row) > 0:
            axes.scatter(amount(row), findings.factor * row.mean, s=34, facecolor="white", edgecolor=colour, linewidth=1.4, zorder=4)


def _name_lines(axes: Axes, findings: Findings, lines: Sequence[_Line]) -> None:
    """Names at the right, moved apart where lines lie close."""
    low, high = axes.get_ylim()
    places = [(findings.factor * line.score - low) / (high - low) for line in lines]
    order = sorted(range(len(lines)), key=lambda number: places[number])
    for before, number in pairwise(order):
        places[number] = max(places[number], places[before] + _APART)
    for line, place in zip(lines, places, strict=True):
        axes.annotate(
            f"{line.name} {findings.shown(line.score)}",
            (1.0, place),
            xycoords="axes fraction",
            xytext=(6, 0),
            textcoords="offset points",
            va="center",
            color=line.colour,
            fontsize=9,
            annotation_clip=False,
        )


def _as_share(value: float) -> str:
    return f"{100 * value:g}%"


def _as_bytes(value: float) -> str:
    return f"{value / 1e6:g} MB" if value >= 1e6 else f"{value / 1e3:g} kB" if value >= 1e3 else f"{value:g}"


def _plural(count: int, word: str) -> str:
    return f"{count} {word}" if count == 1 else f"{count} {word}s"
