"""The Trainer that a script gets from `hf-compress run`: a subclass that carries the flags, and where scripts find it.

    flags -> trainer_of(flags): BoundTrainer -> installed(bound): transformers.Trainer, transformers.trainer.Trainer -> the script
                                                                  DistillTrainer.compression -> a script that takes DistillTrainer itself

The flags stand in the classes, not in a global or an environment variable, so two runs in one process do not meet.
"""

from __future__ import annotations

import functools
import importlib
import inspect
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import transformers
import transformers.trainer

from hf_compress.argument_values import nearest_name
from hf_compress.arguments import FIELDS, CompressionArguments
from hf_compress.callbacks import LayerDropCallback, drop_again, offer_examples, take_flags, were_taken
from hf_compress.card.facts import complete_card_of
from hf_compress.deepspeed_configs import check_launched
from hf_compress.errors import ArgumentError, CompressionError
from hf_compress.gradual_drop import follow_checkpoint
from hf_compress.trainer import DistillTrainer
from hf_compress.trainer_seq2seq import Seq2SeqDistillTrainer
from hf_compress.trials import values_of
from hf_compress.trim_padding import trimming

SEQ2SEQ = "transformers.trainer_seq2seq"
# Loaded here, before `installed` puts another class in the place of their bases.
OWN_TRAINERS: dict[str, type[transformers.Trainer]] = {
    "DistillTrainer": DistillTrainer,
    "Seq2SeqDistillTrainer": Seq2SeqDistillTrainer,
}


@dataclass
class BoundTrainer:
    """A Trainer class that carries flags.

    Attributes:
        trainer_class: the class to put where scripts find `Trainer`.
        compression: the flags.
        constructed: whether the script has made one, or a DistillTrainer of its own that took the flags.
    """

    trainer_class: type[transformers.Trainer]
    compression: CompressionArguments
    constructed: bool = False


def trainer_of(compression: CompressionArguments) -> BoundTrainer:
    """Bind the flags into a subclass of the Trainer that they ask for.

    Raises:
        ArgumentError: no such class, or one that cannot do what the flags ask for.
    """
    base = transformers.Trainer if compression.trainer_class is None else find_trainer(compression.trainer_class)
    without_teacher = compression.teacher_model_name_or_path is None and compression.teacher_cache_dir is None
    if compression.trainer_class in OWN_TRAINERS and without_teacher:
        raise ArgumentError(
            f"--trainer_class {compression.trainer_class} needs a teacher: --teacher_model_name_or_path with a fine-tuned model, or "
            "--teacher_cache_dir with a teacher on disk. "
            "To drop layers without distilling, leave --trainer_class out."
        )
    if hasattr(base, "compression"):  # DistillTrainer and its kin read the flags themselves
        has_flags = compression.trainer_class is None  # a class that was bound before, in the place of transformers.Trainer
        return _bound(base, {} if has_flags else {"compression": compression}, compression, drops=False)
    if compression.distillation_flags:
        flags = ", ".join(f"--{name}" for name in compression.distillation_flags)
        found = "the script's own Trainer" if compression.trainer_class is None else f"{compression.trainer_class}, which"
        raise ArgumentError(f"{flags}: {found} does not distil; add --trainer_class DistillTrainer, or leave them out.")
    namespace: dict[str, Any] = {
        "_load_from_checkpoint": _loading(base),
        "create_model_card": _completing_cards(base),
        "call_model_init": _dropping_again(base),
    }
    if compression.trim_padding:
        namespace["get_train_dataloader"] = _trimming(base)
    return _bound(base, namespace, compression, drops=compression.wants_layer_drop or compression.wants_freezing)


def find_trainer(name: str) -> type[transformers.Trainer]:
    """The class behind `--trainer_class`.

    Raises:
        ArgumentError: no such name, module or class, or a class that is no Trainer.
    """
    if name == "Trainer":
        return transformers.Trainer
    if name in OWN_TRAINERS:
        return OWN_TRAINERS[name]
    module_name, colon, class_name = name.partition(":")
    if not colon:
        raise ArgumentError(
            f"--trainer_class: there is no '{name}'.{nearest_name(name, OWN_TRAINERS)} "
            f"Known: {', '.join(OWN_TRAINERS)}, Trainer; a class of your own is named package.module:Class."
        )
    try:
        found = getattr(importlib.import_module(module_name), class_name)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{module_name}.".startswith(f"{error.name}."):
            raise
        raise ArgumentError(
            f"--trainer_class {name}: there is no module {error.name}; is it beside the script, or on PYTHONPATH?"
        ) from error
    except AttributeError as error:
        raise ArgumentError(f"--trainer_class {name}: {module_name} has no {class_name}.") from error
    if not (isinstance(found, type) and issubclass(found, transformers.Trainer)):
        raise ArgumentError(f"--trainer_class {name}: that is no subclass of transformers.Trainer.")
    return found


def _bound(base: type[transformers.Trainer], namespace: dict[str, Any], compression: CompressionArguments, *, drops: bool) -> BoundTrainer:
    """A subclass that notes its use, leaves no empty folder behind when it refuses, and drops or freezes layers if it is to."""

    @functools.wraps(base.__init__)
    def init(self: transformers.Trainer, *args: Any, **kwargs: Any) -> None:
        bound.constructed = True
        take_flags(compression)
        given = {**dict(zip(_names(base), args, strict=False)), **kwargs}
        if drops:
            given["callbacks"] = [_layer_drop_callback(compression, given), *(given.get("callbacks") or ())]
        with _no_empty_folder(given.get("args")):
            check_launched(getattr(given.get("args"), "deepspeed", None))
            super(made, self).__init__(**given)

    made: Any = type(base.__name__, (base,), {**namespace, "__init__": init, "__module__": base.__module__, "__doc__": base.__doc__})
    bound = BoundTrainer(made, compression)
    return bound


def _names(cls: type[transformers.Trainer]) -> list[str]:
    """The names of the arguments that a Trainer takes by position; those of transformers' own where it takes any number."""
    parameters = list(inspect.signature(cls.__init__).parameters.values())[1:]
    if any(parameter.kind is parameter.VAR_POSITIONAL for parameter in parameters):
        return TRAINER_ARGUMENTS
    return [parameter.name for parameter in parameters if parameter.kind is parameter.POSITIONAL_OR_KEYWORD]


TRAINER_ARGUMENTS = _names(transformers.Trainer)


def _layer_drop_callback(compression: CompressionArguments, given: dict[str, Any]) -> LayerDropCallback:
    """The callback that the flags ask for, with the examples that the contribution strategy measures on: the dev set, as in the paper."""
    callback = LayerDropCallback.from_arguments(compression)
    offer_examples([callback], given)
    return callback


def _trimming(base: type[transformers.Trainer]) -> Callable[[transformers.Trainer], Any]:
    """The `get_train_dataloader` of a plain Trainer under `--trim_padding`."""

    def get_train_dataloader(self: Any) -> Any:
        collator = self.data_collator
        self.data_collator = trimming(collator, self.model, self.args)
        try:
            return base.get_train_dataloader(self)
        finally:
            self.data_collator = collator

    return get_train_dataloader


def _loading(base: type[transformers.Trainer]) -> Callable[..., None]:
    """The `_load_from_checkpoint` of a plain Trainer, which sees that the checkpoint kept the same layers before it loads any weight."""

    def load_from_checkpoint(self: Any, resume_from_checkpoint: str, model: Any = None) -> None:
        own = self.model if model is None else model
        follow_checkpoint(self.callback_handler.callbacks, own, resume_from_checkpoint, optimizer=self.optimizer)
        base._load_from_checkpoint(self, resume_from_checkpoint, model)

    return load_from_checkpoint


def _dropping_again(base: type[transformers.Trainer]) -> Callable[..., Any]:
    """The `call_model_init` of a plain Trainer, which drops the layers of each model that is built; a search sets no flag of ours there."""

    def call_model_init(self: Any, trial: Any = None) -> Any:
        if found := [name for name in values_of(self, trial) if name in FIELDS]:
            raise ArgumentError(
                f"The hyperparameters set --{', --'.join(found)}, and the script's own Trainer takes these as they are for all trials. Add "
                "--trainer_class DistillTrainer with a teacher, or take them out of the hp_space."
            )
        model = base.call_model_init(self, trial)
        if getattr(self, "callback_handler", None) is not None:
            drop_again(self, model)
        return model

    return call_model_init


def _completing_cards(base: type[transformers.Trainer]) -> Callable[..., None]:
    """The `create_model_card` of a plain Trainer, which says which layers were dropped, and how large the model is."""

    @functools.wraps(base.create_model_card)
    def create_model_card(self: Any, *args: Any, measure_latency: bool = False, **kwargs: Any) -> None:
        base.create_model_card(self, *args, **kwargs)
        complete_card_of(self, measure_latency=measure_latency, dataset=kwargs.get("dataset"))

    return create_model_card


@contextmanager
def _no_empty_folder(training_arguments: transformers.TrainingArguments | None) -> Iterator[None]:
    """Take away the output folder if a refusal leaves it empty: Trainer makes it before `on_init_end` can refuse."""
    folder = None if training_arguments is None or training_arguments.output_dir is None else Path(training_arguments.output_dir)
    was_there = folder is None or folder.exists()
    try:
        yield
    except CompressionError:
        if folder is not None and not was_there and folder.is_dir() and not any(folder.iterdir()):
            folder.rmdir()
        raise


@contextmanager
def installed(bound: BoundTrainer) -> Iterator[None]:
    """Put the class where scripts find `Trainer`, and the flags where a script's own DistillTrainer finds them; undo both afterwards.

    `transformers.trainer_seq2seq` binds its base when it is imported, so it is imported anew (and put back afterwards) if it was imported
    before; a class that is a Seq2SeqTrainer itself takes that name's place as well.
    """
    top, module, seq2seq = vars(transformers), vars(transformers.trainer), sys.modules.get(SEQ2SEQ)
    seq2seq_trainer: Any = None if seq2seq is None else vars(seq2seq)["Seq2SeqTrainer"]
    before = {name: top.get(name) for name in ("Trainer", "Seq2SeqTrainer", "trainer_seq2seq")}
    original, flags = module["Trainer"], DistillTrainer.compression
    DistillTrainer.compression = bound.compression
    top["Trainer"] = module["Trainer"] = bound.trainer_class
    if seq2seq is not None and issubclass(bound.trainer_class, seq2seq_trainer):
        top["Seq2SeqTrainer"] = vars(seq2seq)["Seq2SeqTrainer"] = bound.trainer_class
    else:
        for name in ("Seq2SeqTrainer", "trainer_seq2seq"):
            top.pop(name, None)
        sys.modules.pop(SEQ2SEQ, None)
    try:
        yield
    finally:
        module["Trainer"], DistillTrainer.compression = original, flags
        bound.constructed = bound.constructed or were_taken(bound.compression)
        sys.modules.pop(SEQ2SEQ, None)
        if seq2seq is not None:
            vars(seq2seq)["Seq2SeqTrainer"] = seq2seq_trainer
            sys.modules[SEQ2SEQ] = seq2seq
        for name, value in before.items():
            top.pop(name, None)
            if value is not None:
                top[name] = value
