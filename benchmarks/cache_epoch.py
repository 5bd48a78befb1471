"""An epoch with a teacher on disk beside plain fine-tuning of the same student: the user's own commands, on real sentences.

    padded      run_glue.py at its defaults: plain Trainer, every example padded to 128 tokens
    trimmed     the same with --pad_to_max_length False: each batch as long as its longest example
    from disk   run_glue.py at its defaults under DistillTrainer, recipe `mud`, its teacher in a cache, `1l_10t_0.1h`

Each epoch is a process of its own and is timed by the Trainer itself (train_runtime); the three take turns.

    cd $GLUE && python benchmarks/cache_epoch.py --teacher $MODEL --student $STUDENT --json benchmarks/results/cache_epoch.json
    python benchmarks/cache_epoch.py --teacher $MODEL --student $STUDENT --data train.csv --examples 64 --rounds 1
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from measuring import Bar, finish, machine, median

PADDED, TRIMMED, CACHED = "plain, padded", "plain, trimmed", "from disk"
DISTILLING = ["--trainer_class", "DistillTrainer"]


def run(command: list[str]) -> None:
    """Run it to its end.

    Raises:
        RuntimeError: it failed; with the end of what it printed.
    """
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} failed:\n{(done.stdout + done.stderr)[-3000:]}")


def epoch(script: list[str], output: Path, flags: list[str]) -> float:
    """One epoch; its seconds, as the Trainer counted them."""
    run([*script, "--output_dir", str(output), "--num_train_epochs", "1", *flags])
    return float(json.loads((output / "train_results.json").read_text(encoding="utf-8"))["train_runtime"])


def main() -> int:
    """Measure, print the table, and say which bar is missed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    parser.add_argument("--teacher", required=True, metavar="FOLDER", help="a fine-tuned classifier")
    parser.add_argument("--student", required=True, metavar="FOLDER", help="what is trained, in all three")
    parser.add_argument("--script", metavar="FILE", help="another run_glue.py than the package's, such as transformers' own")
    parser.add_argument(
        "--data", metavar="FILE", help=".csv or .json; without it the GLUE task is loaded, from the folder one is in or the hub"
    )
    parser.add_argument("--task", default="mrpc", help="the GLUE task")
    parser.add_argument("--examples", type=int, help="only the first so many")
    parser.add_argument("--selection", default="1l_10t_0.1h", help="what is stored of hidden states")
    parser.add_argument("--rounds", type=int, default=5, help="rounds that count; one goes before them that does not")
    parser.add_argument("--flags", nargs=argparse.REMAINDER, default=[], help="more flags for all three, last on the line")
    parser.add_argument("--json", metavar="FILE")
    options = parser.parse_args()
    facts = {**machine(), "threads": os.environ.get("OMP_NUM_THREADS", "as many as cores")}
    root = Path(tempfile.mkdtemp(prefix="epoch_"))

    script = [sys.executable, "-m", "hf_compress.run", options.script or "glue"]
    script += ["--train_file", options.data, "--validation_file", options.data] if options.data else ["--task_name", options.task]
    script += ["--model_name_or_path", options.student, "--do_train", "--save_strategy", "no", "--report_to", "none", "--use_cpu", "True"]
    script += ["--max_train_samples", str(options.examples)] if options.examples else []
    script += options.flags
    stored = ["--distill_recipe", "mud", "--hidden_states_selection", options.selection]
    cache = [*DISTILLING, "--teacher_cache_dir", str(root / "cache")]
    run(
        [*script, *cache, *stored, "--teacher_model_name_or_path", options.teacher, "--build_teacher_cache_only", "--output_dir", str(root)]
    )

    lanes = {PADDED: [], TRIMMED: ["--pad_to_max_length", "False"], CACHED: cache}
    seconds: dict[str, list[float]] = {name: [] for name in lanes}
    for number in range(1 + options.rounds):
        order = [*lanes][number % len(lanes) :] + [*lanes][: number % len(lanes)]
        for name in order:
            taken = epoch(script, root / name.replace(", ", "-").replace(" ", "-"), lanes[name])
            if number:
                seconds[name].append(taken)
        print(f"\rround {number + 1} of {1 + options.rounds}", end="", file=sys.stderr, flush=True)
    print(file=sys.stderr)

    print(f"{'an epoch':<32} {'seconds':>8}")
    for name, values in seconds.items():
        print(f"{name:<32} {median(values):>8.1f}")

    def ratio(below: str) -> float:
        return median([ours / plain for ours, plain in zip(seconds[CACHED], seconds[below], strict=True)])

    bars = [
        Bar("epoch from disk / plain epoch, padded to 128", ratio(PADDED), 1.0),
        Bar("epoch from disk / plain epoch, trimmed batches", ratio(TRIMMED), 1.05),
    ]
    shapes = {"task": options.data or options.task, "examples": options.examples, "selection": options.selection, "rounds": options.rounds}
    return finish(Path(__file__).stem, facts, bars, {"shapes": shapes, "seconds": seconds}, options.json)


if __name__ == "__main__":
    sys.exit(main())
