"""The flags of the teacher on disk; `arguments.CompressionArguments` has them with all others. No torch here."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from typing import Literal, cast, get_args

from hf_compress.argument_values import layer_numbers, number_of_bytes, one_of
from hf_compress.cache.codec_name import CODEC_NAMES, DEFAULT_CODEC, CodecName
from hf_compress.cache.hub_address import HubAddress, is_hub_address
from hf_compress.cache.selection import DepthScheme, LengthScheme, MaskReading, RankBy, Selection, WidthScheme
from hf_compress.errors import ArgumentError

Miss = Literal["error", "live"]

# Another spelling of a flag's name.
ALIASES = {"hsk": "hidden_states_selection"}
_CHOICES: dict[str, tuple[str, ...]] = {
    "teacher_cache_dtype": CODEC_NAMES,
    "teacher_cache_miss": get_args(Miss),
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
            "yet; any later run trains from it with no teacher loaded. Or one on the Hugging Face hub: hf://datasets/USER/NAME. "
            "Of several teachers: A,B."
        ),
    )
    teacher_cache_dtype: str | None = field(
        default=None, metadata=_flag(f"Number format on disk: {', '.join(CODEC_NAMES)}; by default {DEFAULT_CODEC}.")
    )
    teacher_cache_layers: str | None = field(
        default=None,
        metadata=_flag(
            "More of the teacher's layers to store than this run compares, for later runs with other --hsk_layers: all, or numbers, as in "
            "0,2,5-8; 0 is the embedding output."
        ),
    )
    teacher_cache_logits_top_k: int | None = field(
        default=None,
        metadata=_flag(
            "Language models: how many of each token's logits to store, the largest, as in 64; what all others add up to is stored as one. "
            "By default all, which is as many as the vocabulary has words. In a later run: how many to read of what is stored."
        ),
    )
    teacher_cache_miss: str | None = field(
        default=None,
        metadata=_flag(
            "What becomes of a training example that is not in the finished teacher on disk: error (the default), or live: the teacher "
            "is asked for it, and what it says is appended."
        ),
    )
    teacher_cache_budget: str | None = field(
        default=None,
        metadata=_flag(
            "How large the teacher on disk may be when it is built, as in 200MB or 1.5GB: layers, tokens, dimensions and number format are "
            "then chosen by what is lost of the hidden states. In place of --hidden_states_selection."
        ),
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
        return cast(CodecName, self.teacher_cache_dtype or DEFAULT_CODEC)

    def stored_layers(self, num_layers: int) -> frozenset[int]:
        """The teacher layers that `--teacher_cache_layers` names, of `num_layers`; 0 is the embedding output.

        Raises:
            ArgumentError: no numbers, or a layer that the teacher does not have.
        """
        if self.teacher_cache_layers is None:
            return frozenset()
        if self.teacher_cache_layers == "all":
            return frozenset(range(num_layers + 1))
        named = layer_numbers(self.teacher_cache_layers, flag="teacher_cache_layers", lowest=0)
        if max(named) > num_layers:
            raise ArgumentError(f"--teacher_cache_layers names layer {max(named)}, but the teacher has {num_layers} layers.")
        return frozenset(named)

    @property
    def cache_budget(self) -> int | None:
        """The bytes of `--teacher_cache_budget`; None where it is not given."""
        return None if self.teacher_cache_budget is None else number_of_bytes(self.teacher_cache_budget, flag="teacher_cache_budget")

    def check_teacher_cache(self) -> None:
        """Refuse values that are unknown, and flags that would do nothing.

        Raises:
            ArgumentError: naming the flag.
        """
        for flag, known in _CHOICES.items():
            value = getattr(self, flag)
            if value is not None:
                one_of(value, known, flag=flag)
        if self.teacher_cache_logits_top_k is not None:
            self.teacher_cache_logits_top_k = _whole_number(self.teacher_cache_logits_top_k, flag="teacher_cache_logits_top_k")
        details = [flag for flag in _CHOICES if flag.startswith("hsk_") and getattr(self, flag) is not None]
        if self.cache_budget is not None:
            chosen = [name for name in ("hidden_states_selection", *details, "teacher_cache_layers") if getattr(self, name) is not None]
            if chosen:
                raise ArgumentError(
                    f"--teacher_cache_budget chooses what is kept, and --{', --'.join(chosen)} says it already: give one of the two."
                )
        if details and self.hidden_states_selection is None:
            raise ArgumentError(f"--{', --'.join(details)}: of how much? Add --hidden_states_selection (--hsk), such as 1l_10t_0.1h.")
        for flag in (
            "teacher_cache_dtype",
            "teacher_cache_layers",
            "teacher_cache_logits_top_k",
            "teacher_cache_budget",
            "teacher_cache_miss",
            "hidden_states_selection",
        ):
            if getattr(self, flag) is not None and self.teacher_cache_dir is None:
                raise ArgumentError(f"--{flag} is about a teacher on disk: add --teacher_cache_dir with the folder to keep it in.")
        if self.build_teacher_cache_only and self.teacher_cache_dir is None:
            raise ArgumentError("--build_teacher_cache_only: where? Add --teacher_cache_dir with the folder to build it in.")
        folders = self.teacher_cache_dir or ""
        for folder in filter(is_hub_address, [folders] if os.path.isdir(folders) else folders.split(",")):
            address = HubAddress.parse(folder)
            if self.build_teacher_cache_only:
                raise ArgumentError(
                    f"--build_teacher_cache_only: nothing is built on the hub. Build it in a folder (--teacher_cache_dir FOLDER), then "
                    f"`hf-compress cache push FOLDER {address.repo}`."
                )
            if self.teacher_cache_miss == "live":
                raise ArgumentError(
                    f"--teacher_cache_miss live appends to the teacher on disk, and nothing is appended to {address}. Name a folder with "
                    f"--teacher_cache_dir: a copy of it (`hf download {address.repo} --repo-type dataset --local-dir FOLDER`), or one "
                    "that you build."
                )
        _ = self.selection
        if self.teacher_cache_layers not in (None, "all"):
            layer_numbers(self.teacher_cache_layers, flag="teacher_cache_layers", lowest=0)


def _whole_number(value: object, *, flag: str) -> int:
    """A number from 1 up; a file may give it as text."""
    if isinstance(value, bool) or not str(value).isdigit() or int(str(value)) < 1:
        raise ArgumentError(f"--{flag} is {value!r}; expected a whole number of at least 1.")
    return int(str(value))
