"""`hf-compress demo`: the whole flow on a small corpus that it writes itself."""

from __future__ import annotations

from collections.abc import Sequence

from hf_compress.cli.flags import FlagParser


def main(argv: Sequence[str]) -> int:
    """Run the demo and print its table; returns the exit code."""
    parser = FlagParser("demo", "Train a teacher, make students, distil: offline, on two cores, in about three minutes.")
    parser.flag("output_dir", "-o", default="demo_output", metavar="DIR", help="Where the report goes; by default demo_output.")
    parser.flag("seed", type=int, default=0, metavar="N", help="Of the models' weights and of the order of the data; by default 0.")
    parser.flag("grammar_seed", type=int, default=0, metavar="N", help="Of the corpus: its words and sentences; by default 0.")
    parser.flag("scale", type=float, default=1.0, metavar="X", help="Less than 1 is a shorter demo, which claims nothing.")
    flags = parser.parse(argv)

    from hf_compress.report.demo import run_demo  # loads torch, which the help need not wait for

    run_demo(flags.output_dir, seed=flags.seed, grammar_seed=flags.grammar_seed, scale=flags.scale)
    return 0
