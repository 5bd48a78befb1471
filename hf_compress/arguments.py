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
from hf_compress.argument_values import layer_numbers, layer_pairs, nearest_name, numbers_by_name, one_of
from hf_compress.cache_arguments import ALIASES, TeacherCacheArguments
from hf_compress.errors import ArgumentError
from hf_compress.losses.recipes import LossName, RecipeName

LayerDropStrategyName = Literal["top", "bottom", "symmetric", "alternate", "alternate_odd", "contribution"]
StackName = Literal["encoder", "decoder", "both"]
PhaseName = Literal["intermediate", "prediction"]
DtypeName = Literal["auto", "float32", "bfloat16", "float16"]
LayerMapName = Literal["uniform", "top", "bottom", "kept"]

# What a flag holds as text may be a list or a mapping in a file or in Python. HfArgumentParser takes the first type if None is the second.
Layers = str | None | list[int]
NumbersByName = str | None | dict[str, float]
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
class CompressionArguments(TeacherCacheArguments):
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
    layer_drop_strategy: str | None = field(
        default=None, metadata=_flag(f"Which layers to drop: {', '.join(get_args(LayerDropStrategyName))}.")
    )
    num_layers_to_drop: int | None = field(
        default=None, metadata=_flag("How many layers the strategy drops; by default a third, at least one.")
    )
    layers_to_drop: Layers = field(
        default=None, metadata=_flag("The layers to drop instead of a strategy, counted from 1: 5-8 or 5,6,7,8.")
    )
    layers_to_keep: Layers = field(default=None, metadata=_flag("The layers to keep instead of a strategy, counted from 1: 1-4,9-12."))
    layer_drop_threshold: float | None = field(
        default=None,
        metadata=_flag(
            "With the contribution strategy: drop the layers whose input and output are more alike than this cosine (by default 0.95)."
        ),
    )
    layer_drop_stack: str | None = field(
        default=None, metadata=_flag("Where a model has an encoder and a decoder, which of them loses layers: encoder, decoder, both.")
    )
    layer_drop_after_epochs: int | None = field(
        default=None,
        metadata=_flag("Train with all layers for so many epochs, then drop, then train on; by default layers go before training."),
    )
    layer_drop_every_n_epochs: int | None = field(
        default=None, metadata=_flag("Drop one layer after every so many epochs of training, until all that are to go have gone.")
    )
    freeze_layers_before_drop: bool = field(
        default=False, metadata=_flag("With one of these two: do not train the layers that are to go while they are there.")
    )
    freeze_embeddings: bool = field(default=False, metadata=_flag("Do not train the embeddings."))
    layers_to_freeze: Layers = field(
        default=None, metadata=_flag("Layers not to train, counted from 1 in the full model, before any is dropped: 1-4.")
    )
    teacher_model_name_or_path: str | None = field(
        default=None, metadata=_flag("The fine-tuned teacher: a folder, or the name of a model on the Hub.")
    )
    teacher_revision: str | None = field(default=None, metadata=_flag("Branch, tag or commit of the teacher."))
    teacher_dtype: str | None = field(
        default=None, metadata=_flag(f"The teacher's number format: {', '.join(get_args(DtypeName))}; by default as it was saved.")
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
    distill_layer_map: LayerMapPairs = field(
        default=None,
        metadata=_flag("Which teacher layer teaches which student layer: uniform, top, bottom, kept, or pairs student:teacher 1:3,2:6."),
    )
    distill_phases: NumbersByName = field(
        default=None,
        metadata=_flag("Epochs of training in phases, as in intermediate=20,prediction=3; takes the place of --num_train_epochs."),
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
        self._check_layer_drop()
        self.check_teacher_cache()
        for parsed in ("kept", "dropped", "frozen", "weights", "phases", "layer_map"):
            getattr(self, parsed)

    @property
    def strategy(self) -> LayerDropStrategyName | None:
        """The strategy, checked."""
        return cast("LayerDropStrategyName | None", self.layer_drop_strategy)

    @property
    def stack(self) -> Literal["encoder", "decoder"] | None:
        """The one stack that loses layers; None where all there are do."""
        return None if self.layer_drop_stack == "both" else cast("Literal['encoder', 'decoder'] | None", self.layer_drop_stack)

    @property
    def recipe(self) -> RecipeName | None:
        """The recipe, checked."""
        return cast("RecipeName | None", self.distill_recipe)

    @property
    def kept(self) -> tuple[int, ...] | None:
        """The layers of `--layers_to_keep`, ascending, counted from 1."""
        return None if self.layers_to_keep is None else layer_numbers(self.layers_to_keep, flag="layers_to_keep")

    @property
    def dropped(self) -> tuple[int, ...] | None:
        """The layers of `--layers_to_drop`, ascending, counted from 1."""
        return None if self.layers_to_drop is None else layer_numbers(self.layers_to_drop, flag="layers_to_drop")

    @property
    def frozen(self) -> tuple[int, ...]:
        """The layers of `--layers_to_freeze`, ascending, counted from 1 in the full model."""
        return () if self.layers_to_freeze is None else layer_numbers(self.layers_to_freeze, flag="layers_to_freeze")

    @property
    def weights(self) -> dict[LossName, float]:
        """The weights given by name; a loss that is not named keeps its recipe's weight."""
        if self.distill_weights is None:
            return {}
        found = numbers_by_name(self.distill_weights, get_args(LossName), flag="distill_weights")
        for name, weight in found.items():
            if not 0 <= weight < float("inf"):
                raise ArgumentError(f"--distill_weights: {name}={weight:g}; a weight is 0 (left out) or more.")
        return cast("dict[LossName, float]", found)

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
    def wants_layer_drop(self) -> bool:
        """Whether any flag asks for layers to be dropped."""
        return self.layer_drop_strategy is not None or self.layers_to_drop is not None or self.layers_to_keep is not None

    @property
    def wants_freezing(self) -> bool:
        """Whether any flag asks for parameters not to be trained."""
        return self.freeze_embeddings or self.layers_to_freeze is not None

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
            ("layer_drop_strategy", get_args(LayerDropStrategyName)),
            ("layer_drop_stack", get_args(StackName)),
            ("distill_recipe", get_args(RecipeName)),
            ("teacher_dtype", get_args(DtypeName)),
        ):
            value = getattr(self, flag)
            if value is not None:
                one_of(value, known, flag=flag)
        if self.trim_padding is not None and not isinstance(self.trim_padding, bool):
            raise ArgumentError(f"--trim_padding is {self.trim_padding!r}; expected true or false.")

    def _check_teacher(self) -> None:
        """Refuse a path that leads nowhere; a name on the Hub is looked up later."""
        path = self.teacher_model_name_or_path
        if path is not None and path.startswith(("/", "./", "../", "~")) and not os.path.isdir(os.path.expanduser(path)):
            raise ArgumentError(f"--teacher_model_name_or_path {path}: there is no such folder. Give the folder of a fine-tuned model.")

    def _check_numbers(self) -> None:
        """Turn what a file gave into numbers, and refuse those out of range."""
        for flag, low, high in (
            ("num_layers_to_drop", 1.0, float("inf")),
            ("layer_drop_after_epochs", 1.0, float("inf")),
            ("layer_drop_every_n_epochs", 1.0, float("inf")),
            ("layer_drop_threshold", 0.0, 1.0),
            ("distill_temperature", 0.0, float("inf")),
            ("distill_skip_heads", 0.0, 1.0),
            ("distill_relation_heads", 1.0, float("inf")),
        ):
            value = getattr(self, flag)
            if value is None:
                continue
            whole = flag in ("num_layers_to_drop", "distill_relation_heads") or flag.endswith("_epochs")
            try:
                number = float(value)
            except (TypeError, ValueError):
                raise ArgumentError(f"--{flag} is {value!r}; expected a number.") from None
            if whole and (number < low or number != int(number)):
                raise ArgumentError(f"--{flag} is {value}; expected a whole number of at least 1.")
            if not whole and not low < number < high:
                limits = f"between {low:g} and {high:g}" if high < float("inf") else f"above {low:g}"
                raise ArgumentError(f"--{flag} is {value}; expected a number {limits}.")
            setattr(self, flag, int(number) if whole else number)

    def _check_layer_drop(self) -> None:
        """Refuse requests that contradict each other."""
        given = [f"--{name}" for name in ("layer_drop_strategy", "layers_to_drop", "layers_to_keep") if getattr(self, name) is not None]
        if len(given) > 1:
            raise ArgumentError(f"{' and '.join(given)} contradict each other; give one of them.")
        if self.num_layers_to_drop is not None and self.layer_drop_threshold is not None:
            raise ArgumentError("--num_layers_to_drop and --layer_drop_threshold contradict each other; give one of them.")
        if self.num_layers_to_drop is not None and self.layer_drop_strategy is None:
            reason = f"{given[0]} says already which layers go" if given else "no --layer_drop_strategy says which layers go"
            raise ArgumentError(f"--num_layers_to_drop {self.num_layers_to_drop}, but {reason}.")
        if self.layer_drop_threshold is not None and self.layer_drop_strategy != "contribution":
            raise ArgumentError("--layer_drop_threshold belongs to --layer_drop_strategy contribution; add that or leave it out.")
        timed = [f"--{name}" for name in ("layer_drop_after_epochs", "layer_drop_every_n_epochs") if getattr(self, name) is not None]
        if len(timed) > 1:
            raise ArgumentError(f"{' and '.join(timed)} contradict each other (all layers at once, one after another); give one of them.")
        if self.freeze_layers_before_drop and not timed:
            raise ArgumentError("--freeze_layers_before_drop, but layers go before training: add --layer_drop_after_epochs.")
        if timed and not given:
            raise ArgumentError(f"{timed[0]}, but no layers are dropped; add --layer_drop_strategy, --layers_to_drop or --layers_to_keep.")
        if timed and self.phases:
            raise ArgumentError(f"{timed[0]} counts epochs, and --distill_phases begins to count anew in each phase; give one of them.")
        if self.layer_drop_stack is not None and not given:
            raise ArgumentError(
                f"--layer_drop_stack {self.layer_drop_stack}, but no layers are dropped; add --layer_drop_strategy, "
                "--layers_to_drop or --layers_to_keep."
            )


_OF_THE_CACHE = {each.name for each in dataclasses.fields(TeacherCacheArguments)}
# In the order of `--help`: what the class above names first, then the teacher on disk.
FIELDS: dict[str, dataclasses.Field[Any]] = {
    each.name: each for each in sorted(dataclasses.fields(CompressionArguments), key=lambda each: each.name in _OF_THE_CACHE)
}
# The flags that say what is compared.
LOSS_FLAGS = (
    "distill_recipe",
    "distill_temperature",
    "distill_weights",
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
