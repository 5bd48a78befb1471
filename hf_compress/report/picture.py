"""The demo's picture: accuracy against size, with an arrow from each student that had labels only to the one that was distilled.

Both trainings of a student are of one size, so the arrows stand upright: what they were taught stands to their right, and name and
time below. What is no transformer is a line across.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator, PercentFormatter

from hf_compress.report.table import Row, Training

INK, FAINT = "#2b2b33", "#8b8b96"
COLOURS = {"labels": "#c26a12", "distilled": "#14796b"}
TICKS = tuple(digit * 10**power for power in range(3, 9) for digit in (1, 2, 5))


def draw_picture(rows: Sequence[Row], path: Path, *, students: Sequence[str], lines: Sequence[str]) -> None:
    """Write the picture as a PNG of 1600 x 1000 pixels.

    Args:
        rows: as in the table.
        path: of the file.
        students: names of the rows that are there at least twice, learnt from labels and distilled, and maybe from disk.
        lines: names of the rows that are drawn as lines across. All others are points.
    """
    figure = Figure(figsize=(8, 5), dpi=200, facecolor="white", layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    points = [row for row in rows if row.name not in lines]
    _lay_out(axes, rows, points)
    for row in rows:
        if row.name in lines:
            _line(axes, row)
    for name in students:
        _student(axes, {row.training: row for row in points if row.name == name})
    for row in points:
        if row.name not in students:
            _point(axes, row, INK, marker="D")
            _beside(axes, row, f"{row.name} {100 * row.accuracy:.1f}%\n{_time(row)}", INK, upper=None)
    figure.savefig(path)


def _lay_out(axes: Axes, rows: Sequence[Row], points: Sequence[Row]) -> None:
    sizes = [row.parameters for row in points]
    lowest, highest = min(row.accuracy for row in rows), max(row.accuracy for row in rows)
    axes.set_xscale("log")
    axes.set_xlim(min(sizes) / (3.5 if any(row.training == "from disk" for row in points) else 1.6), max(sizes) * 2.2)
    axes.set_ylim(lowest - 0.07, highest + 0.06)
    axes.xaxis.set_major_locator(FixedLocator(TICKS))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value / 1e6:g}M" if value >= 1e6 else f"{value / 1e3:g}k"))
    axes.yaxis.set_major_locator(FixedLocator([share / 10 for share in range(11)]))
    axes.yaxis.set_major_formatter(PercentFormatter(xmax=1, decimals=0))
    axes.set_xlabel("parameters (log scale)", color=INK)
    axes.set_ylabel("accuracy on the test set", color=INK)
    axes.set_title("What a teacher adds: same student, same data, same steps", loc="left", color=INK, fontsize=13, pad=14)
    axes.grid(axis="y", color="#ececf1", linewidth=0.8)
    axes.tick_params(colors=FAINT, length=0)
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    axes.spines["bottom"].set_color("#c9c9d2")
    axes.set_axisbelow(True)


def _line(axes: Axes, row: Row) -> None:
    axes.axhline(row.accuracy, color=FAINT, linestyle=(0, (2, 3)), linewidth=1)
    axes.annotate(
        f"{row.name}, {100 * row.accuracy:.1f}%",
        (0.995, row.accuracy),
        xycoords=("axes fraction", "data"),
        xytext=(0, 4),
        ha="right",
        textcoords="offset points",
        color=FAINT,
        fontsize=9,
    )


def _point(axes: Axes, row: Row, colour: str, *, marker: str = "o") -> None:
    axes.scatter(row.parameters, row.accuracy, s=75, marker=marker, color=colour, edgecolor="white", linewidth=1.2, zorder=3)


def _beside(axes: Axes, row: Row, text: str, colour: str, *, upper: bool | None) -> None:
    """To the right of a point; a little higher for the upper of two, lower for the lower, so that close ones stay apart."""
    height, side = {True: (-3, "bottom"), False: (3, "top"), None: (0, "center")}[upper]
    axes.annotate(
        text,
        (row.parameters, row.accuracy),
        xytext=(9, height),
        textcoords="offset points",
        va=side,
        color=colour,
        fontsize=9.5,
        zorder=4,
    )


def _above(axes: Axes, row: Row) -> None:
    """What it is, and how long it takes, over the highest point of a model: the dotted lines lie below."""
    axes.annotate(
        f"{row.name}\n{_time(row)}",
        (row.parameters, row.accuracy),
        xytext=(0, 11),
        textcoords="offset points",
        ha="center",
        va="bottom",
        color=INK,
        fontsize=9,
        zorder=4,
    )


def _time(row: Row) -> str:
    return f"{row.milliseconds:.2g} ms an example"


def _student(axes: Axes, runs: dict[Training, Row]) -> None:
    """Both points, and an arrow to the distilled one; it points down where distilling did harm."""
    labels, distilled = runs["labels"], runs["distilled"]
    better = distilled.accuracy >= labels.accuracy
    axes.annotate(
        "",
        (distilled.parameters, distilled.accuracy),
        (labels.parameters, labels.accuracy),
        arrowprops={"arrowstyle": "-|>", "color": COLOURS["distilled"], "linewidth": 1.6, "shrinkA": 6, "shrinkB": 5},
        zorder=2,
    )
    if (stored := runs.get("from disk")) is not None:
        axes.scatter(stored.parameters, stored.accuracy, s=75, facecolor="none", edgecolor=COLOURS["distilled"], linewidth=1.6, zorder=4)
        axes.annotate(
            f"from {(stored.stored_bytes or 0) / 1e3:.0f} kB on disk {100 * stored.accuracy:.1f}%",
            (stored.parameters, stored.accuracy),
            xytext=(-9, 0),
            textcoords="offset points",
            ha="right",
            va="center",
            color=COLOURS["distilled"],
            fontsize=9.5,
        )
    for row, upper, words in ((labels, not better, "labels only"), (distilled, better, "distilled")):
        _point(axes, row, COLOURS[row.training])
        _beside(axes, row, f"{words} {100 * row.accuracy:.1f}%", COLOURS[row.training], upper=upper)
    _above(axes, distilled if better else labels)
