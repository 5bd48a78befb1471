"""The table of what `glue.sh` left in a folder: score by row and seed, mean and spread.

python benchmarks/glue_table.py OUT > table.md
"""

from __future__ import annotations

import json
import re
import statistics
import sys
from pathlib import Path

ROW = re.compile(r"(?P<row>.+?)(?:-(?P<seed>\d+))?-(?P<task>mrpc|rte|stsb|cola|sst2)")
ORDER = ("teacher", "drop", "distil", "recipe")


def scores(folder: Path) -> dict[str, dict[str, dict[str, tuple[float, float | None]]]]:
    """By task, row and seed: accuracy and F1, in percent."""
    found: dict[str, dict[str, dict[str, tuple[float, float | None]]]] = {}
    for path in sorted(folder.glob("*/eval_results.json")):
        name = ROW.fullmatch(path.parent.name)
        if name is None:
            continue
        result = json.loads(path.read_text(encoding="utf-8"))
        f1 = result.get("eval_f1")
        rows = found.setdefault(name["task"], {}).setdefault(name["row"], {})
        rows[name["seed"] or "42"] = (100 * result["eval_accuracy"], None if f1 is None else 100 * f1)
    return found


def line(row: str, by_seed: dict[str, tuple[float, float | None]]) -> str:
    """One line of the table."""
    accuracies = [accuracy for accuracy, _ in by_seed.values()]
    f1s = [f1 for _, f1 in by_seed.values() if f1 is not None]
    each = ", ".join(f"{seed}: {accuracy:.1f}" for seed, (accuracy, _) in sorted(by_seed.items()))
    spread = f"{max(accuracies) - min(accuracies):.1f}" if len(accuracies) > 1 else ""
    f1_text = f"{statistics.mean(f1s):.1f}" if f1s else ""
    return f"| {row} | {statistics.mean(accuracies):.1f} | {f1_text} | {spread} | {each} |"


def main() -> int:
    """Print a table for each task."""
    for task, rows in scores(Path(sys.argv[1])).items():
        print(f"\n## {task}\n\n| row | accuracy | F1 | spread | by seed |\n|---|---:|---:|---:|---|")
        for row in sorted(rows, key=lambda name: (ORDER.index(name.split("-")[0].rstrip("0123456789")), name)):
            print(line(row, rows[row]))
    return 0


if __name__ == "__main__":
    sys.exit(main())
