"""The flags, as one dataclass that `HfArgumentParser`, a JSON or YAML file, and Python fill alike. Neither torch nor transformers here.

A field holds what the user wrote, plain enough for JSON ("5-8", "labels=0.5,logits=1"); a property of a shorter name holds what it
means ((5, 6, 7, 8), {"labels": 0.5, "logits": 1.0}). None means "not given": who uses the value knows the default.
"""

from __future__ import annotations

import dataclasses
import os
from dataclasses import dataclass, field
from typing import Any, Literal, cast, get_args

from hf_compress.argument_file import read_argument_file
from hf_compress.argument_values import INFINITE, layer_pairs, nearest_name, number_within, numbers_by_name, one_of
from hf_compress.cache_arguments import ALIASES, TeacherCacheArguments
from hf_compress.errors import ArgumentError
from hf_compress.layer_drop_arguments import TIMED, LayerDropArguments
from hf_compress.losses.recipes import LossName, RecipeName
from hf_compress.teacher_places import as_text, check_teacher_places, count_of_teachers, places

PhaseName = Literal["intermediate", "prediction"]
DtypeName = Literal["auto", "float32", "bfloat16", "float16"]
LayerMapName = Literal["uniform", "top", "bottom", "kept"]

# What a flag holds as text may be a list or a mapping in a file or in Python. HfArgumentParser takes the first type if None is the second.
NumbersByName = str | None | dict[str, float]
Weights = str | None | list[float]
LayerMapPairs = str | None | dict[str, int] | list[list[int]]


@dataclass(frozen=True)
class Phase:
    """A part of the training with losses of its own.

    Attributes:
        name: "intermediate" (hidden states, attention; the classifier frozen) or "prediction" (logits and labels).
        epochs: how long; fractions are allowed.
    """

    name: PhaseName
    epochs: float


def _flag(help_text: str) -> dict[str, str]:
    return {"help": help_text}


@dataclass
class CompressionArguments(LayerDropArguments, TeacherCacheArguments):
    """What to drop, what to freeze, and how to distil.

    Raises:
        ArgumentError: when made, if a value is unknown (with the nearest name) or malformed, or two contradict each other.
    """

    trainer_class: str | None = field(
        default=None,
        metadata=_flag(
            "The Trainer to train with: DistillTrainer, Seq2SeqDistillTrainer, or package.module:Class. By default the script's own."
        ),
    )
    teacher_model_name_or_path: str | None = field(
        default=None,
        metadata=_flag(
            "The fine-tuned teacher: a folder (of an adapter, too), or the name of a model on the Hub. Several: A,B. adapter_off: the "
            "student, its PEFT adapters switched off."
        ),
    )
    teacher_weights: Weights = field(
        default=None,
        metadata=_flag("How much each of several teachers weighs, as in 0.7,0.3; equally by default. One that weighs 0 is not loaded."),
    )
    teacher_revision: str | None = field(default=None, metadata=_flag("Branch, tag or commit of the teacher."))
    teacher_dtype: str | None = field(
        default=None, metadata=_flag(f"The teacher's number format: {', '.join(get_args(DtypeName))}; by default as it was saved.")
    )
    teacher_sharded: bool | None = field(
        default=None, metadata=_flag("Under DeepSpeed's ZeRO-3: split the teacher up too, where it does not fit whole (True or False).")
    )
    distill_recipe: str | None = field(
        default=None, metadata=_flag(f"A method as a set of losses: {', '.join(get_args(RecipeName))}. The first by default.")
    )
    distill_temperature: float | None = field(
        default=None, metadata=_flag("Softens both distributions before the logits are compared; above 0.")
    )
    distill_weights: NumbersByName = field(
        default=None,
        metadata=_flag(
            f"Weights of the losses, as in labels=0.5,logits=1,hidden_states=1; of {', '.join(get_args(LossName))}. 0 leaves one out."
        ),
    )
    distill_final_weights: NumbersByName = field(
        default=None,
        metadata=_flag("What a loss's weight becomes in the course of the training, in a straight line, as in logits=1."),
    )
    distill_layer_map: LayerMapPairs = field(
        default=None,
        metadata=_flag("Which teacher layer teaches which student layer: uniform, top, bottom, kept, or pairs student:teacher 1:3,2:6."),
    )
    distill_phases: NumbersByName = field(
        default=None,
        metadata=_flag("Epochs of training in phases, as in intermediate=20,prediction=3; takes the place of --num_train_epochs."),
    )
    distill_progressive: bool = field(
        default=False,
        metadata=_flag(
            "Teach the layers of the intermediate phase one after another from the bottom, with those below frozen (MobileBERT)."
        ),
    )
    distill_progressive_rate: float | None = field(
        default=None,
        metadata=_flag(
            "With --distill_progressive: let the layers below learn on at this share of the learning rate (0 to 1), not frozen."
        ),
    )
    distill_skip_heads: float | None = field(
        default=None,
        metadata=_flag(
            "Leave out of the attention loss the teacher's heads that give separator tokens more than this share of attention (0 to 1)."
        ),
    )
    distill_relation_heads: int | None = field(
        default=None,
        metadata=_flag(
            "Into how many heads the relation losses (minilm, minilmv2) cut queries, keys and values; divides the width of both models."
        ),
    )
    distill_logits_chunk_size: int | None = field(
        default=None,
        metadata=_flag(
            "Language models: of how many tokens logits are compared at a time, so that those of a whole batch are never in memory; 0 "
            "compares them whole. By default what fits 128 MiB, from vocabularies of 8,192 on."
        ),
    )
    trim_padding: bool | None = field(
        default=None, metadata=_flag("Cut each batch to its longest example (True or False; by default True in DistillTrainer).")
    )
    hf_compress_config: str | None = field(
        default=None, metadata=_flag("A JSON or YAML file with these flags; what is given on the command line wins over it.")
    )

    def __post_init__(self) -> None:
        self._fill_from_file()
        self._check_choices()
        self._check_teacher()
        self._check_numbers()
        self.check_layer_drop()
        self.check_teacher_cache()
        for parsed in ("kept", "dropped", "frozen", "weights", "final_weights", "phases", "layer_map"):
            getattr(self, parsed)
        timed = next((f"--{name}" for name in TIMED if getattr(self, name) is not None), None)
        if timed and self.phases:
            raise ArgumentError(f"{timed} counts epochs, and --distill_phases begins to count anew in each phase; give one of them.")
        if self.distill_progressive and not any(phase.name == "intermediate" for phase in self.phases):
            raise ArgumentError(
                "--distill_progressive says how layers are taught in the intermediate phase, and there is none: add --distill_phases "
                "intermediate=20,prediction=3, or leave it out."
            )
        if self.distill_progressive_rate is not None and not self.distill_progressive:
            raise ArgumentError("--distill_progressive_rate belongs to --distill_progressive; add that or leave it out.")

    @property
    def recipe(self) -> RecipeName | None:
        """The recipe, checked."""
        return cast("RecipeName | None", self.distill_recipe)

    @property
    def weights(self) -> dict[LossName, float]:
        """The weights given by name; a loss that is not named keeps its recipe's weight."""
        return _weights(self.distill_weights, "distill_weights")

    @property
    def final_weights(self) -> dict[LossName, float]:
        """What weights become in the course of the training, by loss."""
        return _weights(self.distill_final_weights, "distill_final_weights")

    @property
    def phases(self) -> tuple[Phase, ...]:
        """The phases in order; empty where all losses act from first to last."""
        if self.distill_phases is None:
            return ()
        found = numbers_by_name(self.distill_phases, get_args(PhaseName), flag="distill_phases")
        for name, epochs in found.items():
            if not 0 < epochs < float("inf"):
                raise ArgumentError(f"--distill_phases: {name}={epochs:g}; a phase lasts more than 0 epochs. Leave it out instead.")
        return tuple(Phase(cast("PhaseName", name), epochs) for name, epochs in found.items())

    @property
    def layer_map(self) -> str | None:
        """The layer map in one spelling: "uniform", "top", "bottom", "kept" or "1:3,2:6"; the depths are not known yet."""
        value = self.distill_layer_map
        if value is None or (isinstance(value, str) and value in get_args(LayerMapName)):
            return value
        if isinstance(value, str) and not any(letter in ":0123456789" for letter in value):
            return one_of(value, get_args(LayerMapName), flag="distill_layer_map")
        pairs = layer_pairs(value, flag="distill_layer_map")
        return ",".join(f"{student}:{teacher}" for student, teacher in pairs)

    @property
    def given(self) -> tuple[str, ...]:
        """The names of the flags that are given."""
        return tuple(name for name, flag in FIELDS.items() if getattr(self, name) != flag.default)

    @property
    def wants_distillation(self) -> bool:
        """Whether a teacher is named or any flag of the distillation is given."""
        return bool(self.distillation_flags)

    @property
    def distillation_flags(self) -> tuple[str, ...]:
        """The names of the teacher's and the distillation's flags that are given."""
        prefixes = ("teacher_", "distill_", "hidden_states_", "hsk_", "build_")
        return tuple(name for name in FIELDS if name.startswith(prefixes) and getattr(self, name) not in (None, False))

    def _fill_from_file(self) -> None:
        """Take from `--hf_compress_config` what was not given here."""
        if self.hf_compress_config is None:
            return
        for name, value in compression_values(read_argument_file(self.hf_compress_config), source=self.hf_compress_config).items():
            if getattr(self, name) == FIELDS[name].default:
                setattr(self, name, value)

    def _check_choices(self) -> None:
        """Refuse names that are not known, before anything is loaded."""
        for flag, known in (
            ("distill_recipe", get_args(RecipeName)),
            ("teacher_dtype", get_args(DtypeName)),
        ):
            value = getattr(self, flag)
            if value is not None:
                one_of(value, known, flag=flag)
        for flag in ("trim_padding", "teacher_sharded"):
            if not isinstance(getattr(self, flag), bool | None):
                raise ArgumentError(f"--{flag} is {getattr(self, flag)!r}; expected true or false.")

    def _check_teacher(self) -> None:
        """Refuse a path that leads nowhere; a name on the Hub is looked up later."""
        for name in ("teacher_model_name_or_path", "teacher_cache_dir"):
            setattr(self, name, as_text(getattr(self, name), flag=name))
        models, folders = self.teacher_model_name_or_path, self.teacher_cache_dir
        check_teacher_places(models, folders, self.teacher_revision, self.teacher_weights)
        for path in places(models, count_of_teachers(models, folders, None), flag="teacher_model_name_or_path"):
            if path is not None and path.startswith(("/", "./", "../", "~")) and not os.path.isdir(os.path.expanduser(path)):
                raise ArgumentError(f"--teacher_model_name_or_path {path}: there is no such folder. Give the folder of a fine-tuned model.")

    def _check_numbers(self) -> None:
        """Turn what a file gave into numbers, and refuse those out of range."""
        for flag, low, high, whole in (
            ("distill_temperature", 0.0, INFINITE, False),
            ("distill_progressive_rate", 0.0, 1.0, False),
            ("distill_skip_heads", 0.0, 1.0, False),
            ("distill_relation_heads", 1.0, INFINITE, True),
            ("distill_logits_chunk_size", 0.0, INFINITE, True),
        ):
            setattr(self, flag, number_within(getattr(self, flag), low, high, whole=whole, flag=flag))


def _weights(value: NumbersByName, flag: str) -> dict[LossName, float]:
    found = {} if value is None else numbers_by_name(value, get_args(LossName), flag=flag)
    for name, weight in found.items():
        if not 0 <= weight < float("inf"):
            raise ArgumentError(f"--{flag}: {name}={weight:g}; a weight is 0 (left out) or more.")
    return cast("dict[LossName, float]", found)


_OF_THE_CACHE = {each.name for each in dataclasses.fields(TeacherCacheArguments)}
# In the order of `--help`: the Trainer, layer dropping, the distillation, then the teacher on disk.
FIELDS: dict[str, dataclasses.Field[Any]] = {
    each.name: each
    for each in sorted(
        dataclasses.fields(CompressionArguments), key=lambda each: (each.name in _OF_THE_CACHE, each.name != "trainer_class")
    )
}
# The flags that say what is compared.
LOSS_FLAGS = (
    "distill_recipe",
    "distill_temperature",
    "distill_weights",
    "distill_final_weights",
    "distill_layer_map",
    "distill_skip_heads",
    "distill_relation_heads",
)
SWITCHES = frozenset(name for name, each in FIELDS.items() if each.type in ("bool", "bool | None"))  # as written: parsers replace types


def compression_values(values: dict[str, Any], *, source: str) -> dict[str, Any]:
    """The values of a file, once each name is known to be a flag.

    Raises:
        ArgumentError: a name that is no flag of hf_compress (with the nearest), or a file that names another file.
    """
    values = {ALIASES.get(name, name): value for name, value in values.items()}
    for name in values:
        if name not in FIELDS:
            raise ArgumentError(
                f"{source}: hf_compress has no flag '{name}'.{nearest_name(name, FIELDS)} Only its own flags belong in this file; "
                "the script's stand on the command line."
            )
    if "hf_compress_config" in values:
        raise ArgumentError(f"{source}: hf_compress_config cannot stand in such a file itself.")
    return values
