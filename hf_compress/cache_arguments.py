"""The flags of the teacher on disk; `arguments.CompressionArguments` has them with all others. No torch here."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal, cast, get_args

from hf_compress.argument_values import one_of
from hf_compress.cache.selection import DepthScheme, LengthScheme, MaskReading, RankBy, Selection, WidthScheme
from hf_compress.errors import ArgumentError

CodecName = Literal["float32", "float16", "bfloat16", "int8"]

# Another spelling of a flag's name.
ALIASES = {"hsk": "hidden_states_selection"}
_CHOICES: dict[str, tuple[str, ...]] = {
    "teacher_cache_dtype": get_args(CodecName),
    "hsk_layers": get_args(DepthScheme),
    "hsk_length": get_args(LengthScheme),
    "hsk_rank_by": get_args(RankBy),
    "hsk_width": get_args(WidthScheme),
    "hsk_mask": get_args(MaskReading),
}


def _flag(help_text: str, *aliases: str) -> dict[str, object]:
    return {"help": help_text, **({"aliases": list(aliases)} if aliases else {})}


@dataclass
class TeacherCacheArguments:
    """Where the teacher is on disk, and how much of it."""

    teacher_cache_dir: str | None = field(
        default=None,
        metadata=_flag(
            "A folder with what the teacher says of the training data. Built there from --teacher_model_name_or_path if it is not there "
            "yet; any later run trains from it with no teacher loaded."
        ),
    )
    teacher_cache_dtype: str | None = field(
        default=None, metadata=_flag(f"Number format on disk: {', '.join(get_args(CodecName))}; by default float16.")
    )
    build_teacher_cache_only: bool = field(default=False, metadata=_flag("Build the teacher on disk, then end without training."))
    hidden_states_selection: str | None = field(
        default=None,
        metadata=_flag(
            "How much of the hidden states is stored, or read of what is stored: layers, tokens, share of the dimensions, as in "
            "1l_10t_0.1h; all by default.",
            "--hsk",
        ),
    )
    hsk_layers: str | None = field(
        default=None,
        metadata=_flag(
            f"Which layers 1l are: {', '.join(get_args(DepthScheme))} (the last student layer learns from 2/3, 5/6, all of the way up)."
        ),
    )
    hsk_length: str | None = field(
        default=None, metadata=_flag(f"Which tokens 10t are: {', '.join(get_args(LengthScheme)[1:])}; by default attention_no_sep.")
    )
    hsk_rank_by: str | None = field(
        default=None, metadata=_flag(f"What attention is ranked by: {', '.join(get_args(RankBy))}; by default probabilities.")
    )
    hsk_width: str | None = field(
        default=None, metadata=_flag(f"Which dimensions 0.1h are: {', '.join(get_args(WidthScheme)[1:])}; by default pca.")
    )
    hsk_mask: str | None = field(
        default=None,
        metadata=_flag("What becomes of the other dimensions: ignore (the default), or zero_target, as the paper's code has it."),
    )

    @property
    def selection(self) -> Selection | None:
        """What `--hidden_states_selection` means; None where it is not given."""
        if self.hidden_states_selection is None:
            return None
        return Selection.parse(
            str(self.hidden_states_selection),
            scheme=cast("DepthScheme | None", self.hsk_layers),
            length=cast("LengthScheme | None", self.hsk_length),
            rank_by=cast("RankBy | None", self.hsk_rank_by),
            width_scheme=cast("WidthScheme | None", self.hsk_width),
            mask=cast("MaskReading | None", self.hsk_mask),
        )

    @property
    def codec(self) -> CodecName:
        """The number format, checked."""
        return cast(CodecName, self.teacher_cache_dtype or "float16")

    def check_teacher_cache(self) -> None:
        """Refuse values that are unknown, and flags that would do nothing.

        Raises:
            ArgumentError: naming the flag.
        """
        for flag, known in _CHOICES.items():
            value = getattr(self, flag)
            if value is not None:
                one_of(value, known, flag=flag)
        details = [flag for flag in _CHOICES if flag.startswith("hsk_") and getattr(self, flag) is not None]
        if details and self.hidden_states_selection is None:
            raise ArgumentError(f"--{', --'.join(details)}: of how much? Add --hidden_states_selection (--hsk), such as 1l_10t_0.1h.")
        for flag in ("teacher_cache_dtype", "hidden_states_selection"):
            if getattr(self, flag) is not None and self.teacher_cache_dir is None:
                raise ArgumentError(f"--{flag} is about a teacher on disk: add --teacher_cache_dir with the folder to keep it in.")
        if self.build_teacher_cache_only and self.teacher_cache_dir is None:
            raise ArgumentError("--build_teacher_cache_only: where? Add --teacher_cache_dir with the folder to build it in.")
        _ = self.selection
