"""The demo with three seeds: what distilling adds to each student, and how far the seeds spread.

    .venv/bin/python benchmarks/demo_seeds.py --json benchmarks/results/demo.json

Writes the JSON, and beside it the same as a table in Markdown. The bar: for both students the mean gain of distilling (accuracy
distilled - labels only, same seed) is larger than the spread, the largest minus the smallest accuracy over the seeds, of either training;
and the bag of words stays 10 points under the teacher with each seed. Ends with exit code 1 if a bar is missed.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hf_compress.report.demo import STUDENTS, TEACHER, WORDS, run_demo
from hf_compress.report.document import DemoReport, fairness, machine
from hf_compress.report.table import json_rows


def main(argv: Sequence[str] | None = None) -> int:
    """Run the demos, write what they found, and return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="of weights and order")
    parser.add_argument("--grammar-seed", type=int, default=0, help="of the corpus, the same for all")
    parser.add_argument("--json", type=Path, default=Path("benchmarks/results/demo.json"), help="the file; its .md goes beside it")
    flags = parser.parse_args(argv)
    reports, processor_seconds = [], []
    for seed in flags.seeds:
        started = time.process_time()
        with tempfile.TemporaryDirectory() as folder:
            reports.append(run_demo(folder, seed=seed, grammar_seed=flags.grammar_seed))
        processor_seconds.append(time.process_time() - started)
    found = summary(reports, processor_seconds)
    flags.json.parent.mkdir(parents=True, exist_ok=True)
    flags.json.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
    flags.json.with_suffix(".md").write_text(markdown(found), encoding="utf-8")
    print(markdown(found))
    return 0 if found["passed"] else 1


def summary(reports: Sequence[DemoReport], processor_seconds: Sequence[float]) -> dict[str, Any]:
    """Mean and spread of each row over the reports, the students' gains, and whether the bars are met."""
    first = reports[0]
    rows = []
    for row in first.rows:
        accuracies = [report.row(row.name, row.training).accuracy for report in reports]
        rows.append(
            {
                "name": row.name,
                "training": row.training,
                "accuracies": accuracies,
                "mean": statistics.mean(accuracies),
                "spread": max(accuracies) - min(accuracies),
            }
        )
    spreads = {name: max(row["spread"] for row in rows if row["name"] == name) for name in STUDENTS}
    gains = {name: statistics.mean(report.gain(name) for report in reports) for name in STUDENTS}
    margin = min(report.row(TEACHER).accuracy - report.row(WORDS).accuracy for report in reports)
    return {
        "passed": all(gains[name] > spreads[name] for name in STUDENTS) and margin >= 0.10,
        "seeds": [report.seed for report in reports],
        "grammar_seed": first.grammar_seed,
        "rows": rows,
        "gains": gains,
        "spreads": spreads,
        "teacher_over_bag_of_words": margin,
        "seconds": [report.seconds for report in reports],
        "processor_seconds": list(processor_seconds),
        "comparison": fairness(first.settings),
        "machine": machine(first.threads),
        "runs": [json_rows(report.rows) for report in reports],
    }


def markdown(found: dict[str, Any]) -> str:
    """The summary as a page."""
    seeds = [str(seed) for seed in found["seeds"]]
    lines = [
        "# The demo, seed by seed",
        "",
        f"{found['comparison']} Spread is the largest minus the smallest accuracy over the seeds.",
        "",
        "| " + " | ".join(["model", "learnt from", *(f"seed {seed}" for seed in seeds), "mean", "spread"]) + " |",
        "| --- | --- |" + " ---: |" * (len(seeds) + 2),
    ]
    for row in found["rows"]:
        numbers = [*row["accuracies"], row["mean"], row["spread"]]
        lines.append("| " + " | ".join([row["name"], row["training"], *(f"{100 * number:.1f}" for number in numbers)]) + " |")
    lines.append("")
    for name in STUDENTS:
        gain, spread = found["gains"][name], found["spreads"][name]
        verdict = "more" if gain > spread else "NOT more"
        lines.append(f"- {name}: distilling adds {100 * gain:.1f} points in the mean, {verdict} than the spread, {100 * spread:.1f}.")
    lines += [
        f"- The bag of words is at least {100 * found['teacher_over_bag_of_words']:.1f} points under the teacher.",
        f"- Seconds in all, seed by seed: {', '.join(f'{value:.0f}' for value in found['seconds'])}; "
        f"processor seconds: {', '.join(f'{value:.0f}' for value in found['processor_seconds'])}.",
        "- " + ", ".join(f"{name} {value}" for name, value in found["machine"].items()) + ".",
        "",
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
