"""Scripts in several real processes, started by torchrun and joined by gloo, as people start them on one machine."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]

# Without Python's shutdown, in which a gloo thread may abort the process (one run in eight, with a plain Trainer too).
END = """
sys.stdout.flush()
os._exit(0)
"""


def command(script: Path, *arguments: str, processes: int = 2) -> list[str]:
    """The command line that starts a script in so many processes."""
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)] if processes > 1 else []
    return [sys.executable, *launcher, str(script), *arguments]


def environment() -> dict[str, str]:
    """Of the processes: this repository's package, one thread each."""
    return {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}


def launch(folder: Path, source: str, *arguments: str, processes: int = 2) -> str:
    """Run a script, in `folder`, on so many processes, and wait for its good end.

    Args:
        folder: where it is written; its first argument.
        source: the script, without its end.
        arguments: more of them.
        processes: how many.

    Returns:
        What it wrote to stderr.
    """
    script = folder / "script.py"
    script.write_text(source + END)
    done = subprocess.run(
        command(script, str(folder), *arguments, processes=processes), env=environment(), capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-5000:]
    return done.stderr
