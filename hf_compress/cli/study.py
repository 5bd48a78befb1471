"""`hf-compress study SCRIPT ...`: how much of the teacher's hidden states is worth how much, on the user's own script."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import cast, get_args

from hf_compress.argument_values import one_of
from hf_compress.cache.selection import DepthScheme, LengthScheme, MaskReading, RankBy, WidthScheme
from hf_compress.cli.flags import FlagParser
from hf_compress.errors import ArgumentError, ScriptError
from hf_compress.report.study_arms import (
    DEFAULT_PARTS,
    JOINT,
    PARTS,
    SCHEMES,
    Choices,
    read_arms,
    read_counts,
    read_parts,
    read_schemes,
    read_shares,
)
from hf_compress.report.study_command import read_command

USAGE = "hf-compress study SCRIPT --output_dir OUT [flags of the study, of hf-compress run, and of the script, in any order]"


def main(argv: Sequence[str]) -> int:
    """Run a study; returns the exit code: 0, 1 if a run failed, 130 if it was stopped."""
    parser = _parser()
    if not argv or argv[0] in ("-h", "--help"):
        if not argv:
            raise ScriptError(f"No script was named. Usage: {USAGE}")
        parser.parse(["--help"])
    script, rest = argv[0], list(argv[1:])
    flags, others = parser.parse_known_args(rest)
    output_dir = Path(flags.output_dir)
    given_layers = None if flags.study_layers is None else read_counts(flags.study_layers, "study_layers")
    choices = Choices(
        parts=read_parts(flags.study_parts or ",".join(DEFAULT_PARTS if flags.arms is None else DEFAULT_PARTS[:1])),
        layers=given_layers,
        tokens=read_counts(flags.study_tokens, "study_tokens"),
        shares=read_shares(flags.study_shares),
        schemes=() if flags.study_schemes is None else read_schemes(flags.study_schemes),
        arms=() if flags.arms is None else read_arms(flags.arms),
        joint_layers=cast("DepthScheme | None", _choice(flags.hsk_layers, get_args(DepthScheme), "hsk_layers")),
        joint_length=cast("LengthScheme | None", _choice(flags.hsk_length, get_args(LengthScheme)[1:], "hsk_length")),
        joint_width=cast("WidthScheme | None", _choice(flags.hsk_width, get_args(WidthScheme)[1:], "hsk_width")),
        rank_by=cast("RankBy", _choice(flags.hsk_rank_by, get_args(RankBy), "hsk_rank_by") or "probabilities"),
        mask=cast("MaskReading", _choice(flags.hsk_mask, get_args(MaskReading), "hsk_mask") or "ignore"),
    )
    seeds = read_counts(flags.seeds, "seeds", lowest=0)
    if flags.jobs < 1:
        raise ArgumentError(f"--jobs {flags.jobs}: at least one run at once.")
    command = read_command(script, others, output_dir)
    lines = {} if flags.study_lines is None else _lines(flags.study_lines)

    # From here on with torch, which the help and the errors above need not wait for.
    from hf_compress.report.study import Study, run_study

    return run_study(
        Study(
            command,
            choices,
            seeds,
            metric=flags.metric,
            jobs=flags.jobs,
            table_only=flags.table_only,
            keep_models=flags.keep_models,
            student=flags.study_student,
            lines=lines,
            asked=tuple(argv),
        )
    )


def _parser() -> FlagParser:
    parser = FlagParser(
        "study",
        "Train a student with more and less of the teacher's hidden states, from one teacher on disk, and tell what each part is worth "
        "(MUD, arXiv 2106.05691). Runs that are finished are not repeated.",
    )
    parser.usage = USAGE
    parser.flag("output_dir", "-o", required=True, metavar="OUT", help="Gets study.md, study.json, study.png, and a folder for each run.")
    parser.flag(
        "study_parts", metavar="PARTS", help=f"Of {', '.join(PARTS)}; by default {','.join(DEFAULT_PARTS)}; ends where --arms is given."
    )
    parser.flag("seeds", default="42,43,44", metavar="N,N", help="Each arm is trained with every one; by default 42,43,44.")
    parser.flag("metric", metavar="NAME", help="Of the script's evaluation, such as accuracy; by default the first of eval_results.json.")
    parser.flag(
        "arms", metavar="ARMS", help=f"More joint arms, as 1l_10t_0.1h,2l; none and all too. The part joint has {', '.join(JOINT)}."
    )
    parser.flag("study_layers", metavar="N,N", help="How many pairs of layers the part depth compares; by default 1 to all.")
    parser.flag("study_tokens", default="5,10,20,50", metavar="N,N", help="Numbers of tokens of the part length; by default 5,10,20,50.")
    parser.flag(
        "study_shares",
        default="0.05,0.1,0.2,0.5",
        metavar="X,X",
        help="Shares of the part width; by default 0.05,0.1,0.2,0.5.",
    )
    parser.flag("study_schemes", metavar="SCHEMES", help=f"Only these of depth, length and width: {', '.join(SCHEMES)}.")
    parser.flag("hsk_layers", metavar="SCHEME", help="Which layers 1l is in joint arms, as t_top8; by default of the run's own map.")
    parser.flag("hsk_length", metavar="SCHEME", help="Which tokens 10t are in joint arms; by default attention_no_sep.")
    parser.flag("hsk_width", metavar="SCHEME", help="Which dimensions 0.1h are in joint arms; by default pca.")
    parser.flag("hsk_rank_by", metavar="WAY", help="What attention is ranked by, in all arms: probabilities (the default) or scores.")
    parser.flag("hsk_mask", metavar="WAY", help="What becomes of the other dimensions, in all arms: ignore (the default) or zero_target.")
    parser.flag("jobs", type=int, default=1, metavar="N", help="Runs at once; by default 1.")
    parser.flag("table_only", action="store_true", help="Train nothing: write table and picture of what is finished.")
    parser.flag("keep_models", action="store_true", help="Leave each trained model in its folder; by default they are deleted when scored.")
    parser.flag("study_student", metavar="MODEL", help="Where the student's config is, if the script has no --model_name_or_path.")
    parser.flag("study_lines", metavar="NAME=X", help="More scores to draw and to list, as the metric has them: majority=0.684.")
    return parser


def _choice(value: str | None, known: Sequence[str], flag: str) -> str | None:
    return None if value is None else one_of(value, known, flag=flag)


def _lines(text: str) -> dict[str, float]:
    lines: dict[str, float] = {}
    for part in filter(None, (piece.strip() for piece in text.split(","))):
        name, _, number = part.partition("=")
        try:
            lines[name.strip()] = float(number)
        except ValueError:
            raise ArgumentError(f"--study_lines: '{part}' is no name with a number; write for example majority=0.684.") from None
    return lines
