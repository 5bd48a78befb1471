"""The picture of `tinybert_ablation.py`: a row an arm, its score on one task, between the student alone and the teacher.

python benchmarks/ablation_picture.py benchmarks/results/tinybert_ablation.json sst2 benchmarks/results/tinybert_ablation.png
"""

from __future__ import annotations

import json
import statistics
import sys
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.transforms import blended_transform_factory
from tinybert_ablation import ARMS

INK, FAINT, GRID = "#2b2b33", "#8b8b96", "#ececf1"
BAD, GOOD = "#c26a12", "#14796b"
GROUPS = {
    "TinyBERT, and what it is without a part": (
        "full no_general pca no_task no_augmentation no_layers no_attention no_hidden no_embeddings no_prediction top "
        "bottom skip_heads alone"
    ),
    "Other recipes, the same student and steps": "layerwise mud mud_tenth minilm minilmv2 mobilebert emd ckd fitnets alp pkd distilbert",
    "Students of other shapes": "half half_tinybert half_alone pruned pruned_tenth pruned_alone",
}


def scores_of(arms: dict[str, Any], name: str) -> list[float]:
    """Of all seeds."""
    return [found["score"] for found in arms.get(name, {}).values()]


def draw(task: dict[str, Any], title: str, path: Path) -> None:
    """Write the picture as a PNG.

    Args:
        task: one task of the results.
        title: above it.
        path: of the file.
    """
    arms, teacher = task["arms"], float(task["teacher"])
    shown = {group: [name for name in names.split() if scores_of(arms, name)] for group, names in GROUPS.items()}
    rows = sum(len(names) + 1.6 for names in shown.values() if names)
    figure = Figure(figsize=(8.4, 0.9 + 0.245 * rows), dpi=170, facecolor="white", layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    alone = statistics.fmean(scores_of(arms, "alone"))
    at = 0.0
    for group, names in shown.items():
        if not names:
            continue
        at += 1.0
        axes.text(0, at, group, transform=_left_of(axes), color=INK, fontsize=9, fontweight="bold", va="center")
        for name in sorted(names, key=lambda each: -statistics.fmean(scores_of(arms, each))):
            at += 1.0
            _row(axes, at, ARMS[name].what, scores_of(arms, name), alone)
        at += 0.6
    _lay_out(axes, at, teacher, title)
    figure.savefig(path)


def _left_of(axes: Axes) -> Any:
    """Coordinates: across the axes, down the rows."""
    return blended_transform_factory(axes.transAxes, axes.transData)


def _row(axes: Axes, at: float, words: str, scores: list[float], alone: float) -> None:
    mean = statistics.fmean(scores)
    colour = GOOD if mean > alone else BAD
    axes.plot([alone, mean], [at, at], color=colour, linewidth=2, alpha=0.35, solid_capstyle="butt")
    axes.plot(scores, [at] * len(scores), "o", color=colour, markersize=3, alpha=0.5 if len(scores) > 1 else 0)
    axes.plot([mean], [at], "o", color=colour, markersize=5.5)
    axes.annotate(f"{mean:.1f}", (max(*scores, mean), at), xytext=(7, 0), textcoords="offset points", va="center", fontsize=8, color=INK)
    axes.text(-0.015, at, words, transform=_left_of(axes), ha="right", va="center", fontsize=8, color=INK)


def _lay_out(axes: Axes, bottom: float, teacher: float, title: str) -> None:
    axes.axvline(teacher, color=INK, linestyle=(0, (2, 3)), linewidth=1)
    axes.annotate(
        f"the teacher {teacher:.1f}",
        (teacher, 0.1),
        xytext=(-4, 0),
        textcoords="offset points",
        ha="right",
        va="center",
        fontsize=8,
        color=INK,
    )
    axes.set_ylim(bottom, -0.3)
    axes.set_yticks([])
    axes.margins(x=0.08)
    axes.grid(axis="x", color=GRID, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.tick_params(colors=FAINT, length=0, labelsize=8)
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    axes.spines["bottom"].set_color("#c9c9d2")
    axes.set_xlabel("accuracy on the validation set, percent", color=INK, fontsize=9)
    axes.figure.suptitle(title, x=0.01, ha="left", color=INK, fontsize=11)


def main() -> int:
    """Draw what a file of results has of one task."""
    if len(sys.argv) != 4:
        print(__doc__, file=sys.stderr)
        return 2
    file, task, picture = sys.argv[1:]
    results = json.loads(Path(file).read_text(encoding="utf-8"))["tasks"][task]
    few = {found.get("max_examples") for seeds in results["arms"].values() for found in seeds.values()} - {None}
    size = f", {few.pop():,} training examples" if len(few) == 1 else ""
    draw(results, f"What each part is worth ({task}{size}; lines from the student that was trained alone)", Path(picture))
    return 0


if __name__ == "__main__":
    sys.exit(main())
