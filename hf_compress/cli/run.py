"""`hf-compress run SCRIPT ...`: the same as `python -m hf_compress.run SCRIPT ...`."""

from __future__ import annotations

from collections.abc import Sequence

from hf_compress.run import main as run_main


def main(argv: Sequence[str]) -> int:
    """Run a script with the flags of hf_compress; returns the exit code."""
    return run_main(argv)
