"""From the user's one command line to those of the runs: the flags that all share, and what each adds. No torch here.

hf-compress study SCRIPT --seeds 42,43 --output_dir OUT  (the study's own)   REST (the script's, and those of hf-compress run)
                          |
build     SCRIPT REST --hsk all --build_teacher_cache_only --teacher_cache_layers ... --output_dir OUT/build
an arm    SCRIPT REST without the teacher, --hsk ...       --output_dir OUT/runs/ARM/seed-42 --seed 42
none      SCRIPT REST without the teacher, --distill_phases prediction=(all epochs)
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from hf_compress.argument_file import SUFFIXES
from hf_compress.arguments import CompressionArguments
from hf_compress.cache_arguments import ALIASES
from hf_compress.errors import ArgumentError
from hf_compress.report.study_arms import Arm
from hf_compress.script_arguments import ScriptRequest, parse_command_line
from hf_compress.teacher_places import count_of_teachers

# What the study says itself, run by run.
_REFUSED = {
    "hidden_states_selection": "the arms say that: --study_parts, and --arms 1l_10t_0.1h for more",
    "build_teacher_cache_only": "the study builds the teacher on disk itself, if it is not there",
    "teacher_cache_budget": "all arms read one teacher on disk, which holds what they need",
    "teacher_cache_layers": "the study chooses the layers that its arms need",
    "distill_progressive": "some of its arms teach no layers",
    "distill_progressive_rate": "some of its arms teach no layers",
    "teacher_weights": "all arms learn from one teacher",
}
_TEACHER = ("teacher_model_name_or_path", "teacher_revision", "teacher_dtype")
DEFAULT_RECIPE = "mud"
# transformers' own default.
DEFAULT_EPOCHS = 3.0


@dataclass(frozen=True)
class Command:
    """The user's command, checked.

    Attributes:
        script: as it was named.
        shared: the flags of every run, the teacher's among them.
        flags: those of hf_compress among them.
        script_arguments: the others.
        output_dir: of the study.
    """

    script: str
    shared: tuple[str, ...]
    flags: CompressionArguments
    script_arguments: tuple[str, ...]
    output_dir: Path

    @property
    def cache_dir(self) -> Path:
        """Where the teacher on disk is, or goes."""
        assert self.flags.teacher_cache_dir is not None
        return Path(self.flags.teacher_cache_dir)

    @property
    def of_arms(self) -> tuple[str, ...]:
        """Script and flags that all arms share: no teacher is loaded."""
        return (self.script, *without(self.shared, _TEACHER))

    def reading(self, folder: Path) -> Command:
        """The same command, its teacher on disk in this folder: for a copy of one that is named by an address."""
        shared = (*without(self.shared, ["teacher_cache_dir"]), "--teacher_cache_dir", str(folder))
        return replace(self, shared=shared, flags=replace(self.flags, teacher_cache_dir=str(folder)))

    def build(self, layers: Iterable[int], rank_by: str, seed: int) -> tuple[str, ...]:
        """What builds the teacher on disk; of a finished one it sees that it is this teacher's, and of this data.

        Args:
            layers: that the arms need.
            rank_by: how tokens are ranked.
            seed: of the runs.
        """
        named = ",".join(map(str, sorted(layers)))
        stored = ("--hsk", "all", "--hsk_rank_by", rank_by, "--teacher_cache_layers", named, "--build_teacher_cache_only")
        kept = self.shared if self.flags.teacher_model_name_or_path is not None else self.of_arms[1:]
        return (self.script, *kept, *stored, "--output_dir", str(self.build_dir), "--seed", str(seed))

    def check(self, seed: int) -> tuple[str, ...]:
        """What sees that a finished teacher on disk is the named teacher's, and of this data."""
        return (self.script, *self.shared, "--build_teacher_cache_only", "--output_dir", str(self.build_dir), "--seed", str(seed))

    def arm(self, arm: Arm, seed: int) -> tuple[str, ...]:
        """What trains one arm with one seed."""
        chosen = arm.flags() if arm.selection is not None else ("--distill_phases", f"prediction={self.epochs:g}")
        return (*self.of_arms, *chosen, "--output_dir", str(self.run_dir(arm, seed)), "--seed", str(seed))

    def run_dir(self, arm: Arm, seed: int) -> Path:
        """Where one arm with one seed goes."""
        return self.output_dir / "runs" / arm.name / f"seed-{seed}"

    @property
    def build_dir(self) -> Path:
        """Where the run that builds goes."""
        return self.output_dir / "build"

    @property
    def epochs(self) -> float:
        """How long every arm trains."""
        if self.flags.phases:
            return sum(phase.epochs for phase in self.flags.phases)
        text = value_of(self.script_arguments, "num_train_epochs")
        try:
            return DEFAULT_EPOCHS if text is None else float(text)
        except ValueError:
            raise ArgumentError(f"--num_train_epochs is {text!r}; expected a number.") from None

    @property
    def student(self) -> str | None:
        """The student, as scripts name it."""
        return value_of(self.script_arguments, "model_name_or_path")

    @property
    def max_length(self) -> int:
        """The longest that an example may be; 128, as in the paper, where the script has no such flag."""
        text = value_of(self.script_arguments, "max_seq_length")
        return int(text) if text is not None and text.isdecimal() and int(text) > 0 else 128


def read_command(script: str, rest: Sequence[str], output_dir: Path) -> Command:
    """Check what the runs will be told, and add what they need.

    Args:
        script: a path, or the name of a script that comes with hf_compress.
        rest: the flags that are not the study's own.
        output_dir: of the study.

    Raises:
        ScriptError: there is no such script.
        ArgumentError: a flag of hf_compress is wrong, one is the study's to choose, or the runs would not be scored.
    """
    for name in _names(rest):
        if (why := _REFUSED.get(ALIASES.get(name, name))) is not None:
            raise ArgumentError(f"--{name} is not for `hf-compress study`: {why}. Leave it out.")
    request = parse_command_line([script, *rest])
    _refuse(request, rest)
    more: list[str] = []
    flags = request.compression
    if flags.teacher_cache_dir is None:
        more += ["--teacher_cache_dir", str(output_dir / "teacher_on_disk")]
    if flags.trainer_class is None:
        more += ["--trainer_class", "DistillTrainer"]
    if flags.distill_recipe is None:
        more += ["--distill_recipe", DEFAULT_RECIPE]
    if not _has(request.script_arguments, "save_strategy", "load_best_model_at_end", "save_steps"):
        more += ["--save_strategy", "no"]  # scores are wanted, and there are many runs
    if not _has(request.script_arguments, "disable_tqdm"):
        more += ["--disable_tqdm", "True"]
    shared = (*rest, *more)
    checked = parse_command_line([script, *shared])
    return Command(script, shared, checked.compression, checked.script_arguments, output_dir)


def _refuse(request: ScriptRequest, rest: Sequence[str]) -> None:
    assert request.script is not None
    if request.argument_file is not None or (len(rest) == 1 and Path(rest[0]).suffix.lower() in SUFFIXES):
        raise ArgumentError(
            f"The script's flags stand in {rest[0]}, but every run of a study has its own --output_dir and --seed. Write the flags on "
            "the command line."
        )
    for name, why in _REFUSED.items():
        if name in request.given:
            raise ArgumentError(f"--{name} is not for `hf-compress study`: {why}. Leave it out.")
    if count_of_teachers(request.compression.teacher_model_name_or_path, request.compression.teacher_cache_dir, None) > 1:
        raise ArgumentError("A study has one teacher: all arms learn from what is on disk of it. Name one.")
    if _has(request.script_arguments, "seed"):
        raise ArgumentError("--seed is for one run. A study has several: --seeds 42,43,44.")
    if "max_steps" in _names(request.script_arguments):
        raise ArgumentError("--max_steps: a study counts epochs, so that its arms train equally long. Give --num_train_epochs.")
    text = request.script.read_text(encoding="utf-8", errors="replace")
    for flag, why in (("do_train", "no arm would be trained"), ("do_eval", "no arm would be scored")):
        # A script that names the flag waits for it; TrainingArguments have it whether or not.
        if re.search(rf"\b{flag}\b", text) and not _has(request.script_arguments, flag):
            raise ArgumentError(f"--{flag} is not given, and {request.script} asks for it: {why}. Add --{flag}.")


def without(arguments: Sequence[str], names: Iterable[str]) -> tuple[str, ...]:
    """The arguments without these flags, each of which has one value."""
    spelt = {f"--{spelling}" for name in names for spelling in (name, name.replace("_", "-"))}
    kept: list[str] = []
    skip = False
    for argument in arguments:
        if skip:
            skip = False
        elif argument in spelt:
            skip = True
        elif argument.partition("=")[0] not in spelt:
            kept.append(argument)
    return tuple(kept)


def value_of(arguments: Sequence[str], name: str) -> str | None:
    """What a flag is given, the last time that it is; None where it is not."""
    spelt = (f"--{name}", f"--{name.replace('_', '-')}")
    found = None
    for place, argument in enumerate(arguments):
        head, equals, value = argument.partition("=")
        if head in spelt and equals:
            found = value
        elif argument in spelt and place + 1 < len(arguments):
            found = arguments[place + 1]
    return found


def _names(arguments: Iterable[str]) -> set[str]:
    return {argument.partition("=")[0].lstrip("-").replace("-", "_") for argument in arguments if argument.startswith("--")}


def _has(arguments: Iterable[str], *names: str) -> bool:
    return bool(_names(arguments) & set(names))
