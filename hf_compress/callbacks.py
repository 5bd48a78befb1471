"""LayerDropCallback: drop and freeze layers in any Trainer. UnusedFlagsCallback: no flag does nothing in silence.

    Trainer(...)      on_init_end     freeze, then drop, in place, before there is an optimizer or a wrapper
    .train()          on_train_begin  is the model still the dropped one, and the checkpoint's the same?
                      on_epoch_begin  with a schedule: drop what is due (gradual_drop)
    checkpoints       config.json holds what was kept; trainer_state.json too, to compare when resuming

This file alone imports transformers.TrainerCallback.
"""

from __future__ import annotations

import logging
import weakref
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Protocol

from torch import nn
from transformers import TrainerCallback
from transformers.trainer_callback import ExportableState

from hf_compress.arguments import CompressionArguments
from hf_compress.console_log import show_log
from hf_compress.errors import ArgumentError, LayerDropError
from hf_compress.gradual_drop import GradualDrop
from hf_compress.layers.checkpoint import check_checkpoint, recorded_in_checkpoint, refuse_other_layers
from hf_compress.layers.contribution import Collator, batches_of
from hf_compress.layers.drop import LayerDrop, apply_drop, dropped_parameters, plan_drop
from hf_compress.layers.freeze import check_freeze, freeze
from hf_compress.layers.peft import base_is_forgotten, save_dropped_base
from hf_compress.layers.record import KeptLayers, recorded_drop, recorded_layers
from hf_compress.layers.request import DropRequest, named_layers
from hf_compress.layers.stack import pretrained_model
from hf_compress.layers.strategies import LayerDropStrategy, describe_layers
from hf_compress.layers.zero import forget_unused_renamings, num_elements

logger = logging.getLogger(__name__)


def offer_examples(callbacks: Iterable[Any], given: Mapping[str, Any]) -> None:
    """Hand the examples among a Trainer's arguments to the callbacks that may measure on them: the dev set's, else the train set's."""
    examples = given.get("eval_dataset")
    if isinstance(examples, dict):
        examples = next(iter(examples.values()), None)
    examples = given.get("train_dataset") if examples is None else examples
    for callback in callbacks:
        if isinstance(callback, LayerDropCallback) and examples is not None:
            callback.offer_examples(examples, given.get("data_collator"))


def drop_again(trainer: Any, model: nn.Module) -> None:
    """Drop the layers of a model that a Trainer's `model_init` has built anew, as those of its first one were dropped."""
    for callback in trainer.callback_handler.callbacks:
        if isinstance(callback, LayerDropCallback):
            callback.on_init_end(trainer.args, trainer.state, trainer.control, model=model)


DROP_FLAGS = (
    *("layer_drop_strategy", "num_layers_to_drop", "layers_to_drop", "layers_to_keep", "layer_drop_threshold", "layer_drop_stack"),
    *("layer_drop_after_epochs", "layer_drop_every_n_epochs", "freeze_layers_before_drop", "freeze_embeddings", "layers_to_freeze"),
)


def take_flags(flags: CompressionArguments, names: Iterable[str] | None = None) -> None:
    """Note on the flags that somebody acts on those of these names; without names, on all of them."""
    vars(flags)["_taken"] = {*untaken_flags(flags)} & {*(flags.given if names is None else names)} | vars(flags).get("_taken", set())


def were_taken(flags: CompressionArguments) -> bool:
    """Whether anybody has taken any of the flags."""
    return "_taken" in vars(flags)


def untaken_flags(flags: CompressionArguments) -> tuple[str, ...]:
    """The flags that were given and that nobody acts on."""
    void = {"hf_compress_config", *(["trim_padding"] if flags.trim_padding is False else [])}  # a Trainer does that anyway
    return tuple(name for name in flags.given if name not in void and name not in vars(flags).get("_taken", ()))


class UnusedFlagsCallback(TrainerCallback):
    """Refuses a Trainer whose `args` hold flags of hf_compress that it would pass over.

    `DistillTrainingArguments` puts it among transformers' default callbacks as soon as a flag is given.

    Raises ArgumentError in Trainer's __init__.
    """

    def on_init_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """See that a trainer of hf_compress, or a LayerDropCallback, has taken the flags."""
        left = untaken_flags(args) if isinstance(args, CompressionArguments) else ()
        if left:
            raise ArgumentError(
                f"The training arguments hold --{', --'.join(left)}, and a Trainer that is not hf_compress's own would pass over that. "
                "A script changes two lines, and the second is missing: DistillTrainer in place of Trainer (from hf_compress import "
                "DistillTrainer; Seq2SeqDistillTrainer in place of Seq2SeqTrainer). For layer dropping alone, "
                "callbacks=[LayerDropCallback.from_arguments(args)] does as well."
            )


class DropArguments(Protocol):
    """The flags that say what to drop and what to freeze; `CompressionArguments` has them."""

    num_layers_to_drop: int | None
    layer_drop_threshold: float | None
    layer_drop_after_epochs: int | None
    layer_drop_every_n_epochs: int | None
    freeze_layers_before_drop: bool
    freeze_embeddings: bool

    @property
    def strategy(self) -> LayerDropStrategy | None:
        """The strategy, or None."""

    @property
    def dropped(self) -> tuple[int, ...] | None:
        """The layers named to be dropped."""

    @property
    def kept(self) -> tuple[int, ...] | None:
        """The layers named to be kept."""

    @property
    def stack(self) -> str | None:
        """The stack that loses layers; None for all."""

    @property
    def frozen(self) -> tuple[int, ...]:
        """The layers not to be trained."""


class LayerDropCallback(TrainerCallback, ExportableState):
    """Drops layers of the Trainer's model as soon as the Trainer has it: `Trainer(..., callbacks=[LayerDropCallback("symmetric")])`.

    Layers are counted from 1. What to drop is said as in `hf_compress.drop_layers`; `freeze_embeddings` and `layers_to_freeze`
    (numbered in the full model, whatever is dropped) keep parameters from being trained, with or without dropping.

    A model whose config records the same drop (a checkpoint that is evaluated, or trained on) is left as it is. A run that is
    resumed takes the layers that its checkpoint records. Adapters of a PEFT model get the dropped base saved beside them, in
    output_dir/base_model.

    Args:
        strategy: "top", "bottom", "symmetric", "alternate", "alternate_odd" or "contribution".
        num_layers_to_drop: by default a third of the layers, at least 1.
        layers_to_drop: these instead of a strategy.
        layers_to_keep: all but these.
        threshold: for "contribution": drop the layers more alike than this cosine; by default 0.95.
        examples: for "contribution": a data set or list of tokenised examples, or an iterable of batches; 512 are used, in
            their order. Trainers of this package, and `hf-compress run`, offer the evaluation set by themselves.
        freeze_embeddings: do not train the embeddings.
        layers_to_freeze: do not train these layers.
        stack: "encoder" or "decoder", to touch only one of them.
        after_epochs: train with all layers for so many epochs, then drop, then train on; by default layers go before training.
        every_n_epochs: drop one layer after every so many epochs, until all that are to go have gone; see `hf_compress.layers.schedule`
            for their order.
        freeze_before_drop: with one of these two: do not train the layers that are to go.

    Raises LayerDropError, here or in Trainer's __init__, before anything is changed. In `train`, LayerDropError if the
    callback came too late (add_callback), if a model_init has built a whole model again, or if the checkpoint that is resumed
    kept other layers.
    """

    def __init__(
        self,
        strategy: LayerDropStrategy | None = None,
        *,
        num_layers_to_drop: int | None = None,
        layers_to_drop: Sequence[int] | None = None,
        layers_to_keep: Sequence[int] | None = None,
        threshold: float | None = None,
        examples: Iterable[Mapping[str, Any]] | None = None,
        freeze_embeddings: bool = False,
        layers_to_freeze: Sequence[int] = (),
        stack: str | None = None,
        after_epochs: int | None = None,
        every_n_epochs: int | None = None,
        freeze_before_drop: bool = False,
    ) -> None:
        self.freeze_embeddings = freeze_embeddings
        self.layers_to_freeze = named_layers(layers_to_freeze, "layers_to_freeze") or ()
        self.stack = None if stack == "both" else stack
        asked = (
            strategy,
            num_layers_to_drop,
            layers_to_drop,
            layers_to_keep,
            threshold,
            after_epochs,
            every_n_epochs,
            freeze_before_drop or None,
        )
        freezes_only = all(value is None for value in asked) and (freeze_embeddings or bool(self.layers_to_freeze))
        self.request = (
            None
            if freezes_only
            else DropRequest.of(
                strategy,
                num_layers_to_drop=num_layers_to_drop,
                layers_to_drop=layers_to_drop,
                layers_to_keep=layers_to_keep,
                threshold=threshold,
                stack=stack,
                after_epochs=after_epochs,
                every_n_epochs=every_n_epochs,
                freeze_before_drop=freeze_before_drop,
            )
        )
        self.gradual = GradualDrop(self.request) if self.request is not None and self.request.is_gradual else None
        self.drop: LayerDrop | None = None
        self.came_in_time = False
        self._model: weakref.ref[nn.Module] | None = None
        self._examples = examples
        self._collator: Collator | None = None

    @classmethod
    def from_arguments(cls, arguments: DropArguments) -> LayerDropCallback:
        """The callback that the flags ask for. Raises ArgumentError if they ask for none."""
        asks = (arguments.strategy, arguments.dropped, arguments.kept)
        if all(value is None for value in asks) and not arguments.freeze_embeddings and not arguments.frozen:
            raise ArgumentError("No flag asks for layers to be dropped or frozen, such as --layer_drop_strategy symmetric.")
        if isinstance(arguments, CompressionArguments):
            take_flags(arguments, DROP_FLAGS)
        return cls(
            arguments.strategy,
            num_layers_to_drop=arguments.num_layers_to_drop,
            layers_to_drop=arguments.dropped,
            layers_to_keep=arguments.kept,
            threshold=arguments.layer_drop_threshold,
            freeze_embeddings=arguments.freeze_embeddings,
            layers_to_freeze=arguments.frozen,
            stack=arguments.stack,
            after_epochs=arguments.layer_drop_after_epochs,
            every_n_epochs=arguments.layer_drop_every_n_epochs,
            freeze_before_drop=arguments.freeze_layers_before_drop,
        )

    def offer_examples(self, dataset: Iterable[Mapping[str, Any]], collator: Collator | None = None) -> None:
        """Examples for the contribution strategy, if none were given to the callback itself."""
        if self._examples is None:
            self._examples, self._collator = dataset, collator

    def on_init_end(
        self, args: Any, state: Any, control: Any, model: nn.Module | None = None, optimizer: Any = None, **kwargs: Any
    ) -> None:
        """Freeze, and drop or plan to drop. Raises LayerDropError with the model as it was."""
        show_log()
        if model is None:
            raise LayerDropError("The Trainer has no model to drop layers from.")
        drop = None if self.request is None or self.gradual is not None else self._plan(args, model, self.request)
        if self.gradual is not None:
            self.gradual.plan(args, model, optimizer, self._batches(model))
        check_freeze(model, self.layers_to_freeze, self.stack)
        if drop is not None:
            _check_optimizer(optimizer, model, drop)
        freeze(model, embeddings=self.freeze_embeddings, layers=self.layers_to_freeze, stack=self.stack)
        self._say_what_is_frozen(model)
        forget_unused_renamings(pretrained_model(model))
        self.came_in_time, self._model = True, weakref.ref(pretrained_model(model))
        if self.gradual is not None:
            self.gradual.begin(model, getattr(args, "resume_from_checkpoint", None))
        if drop is None:
            return
        apply_drop(model, drop)
        self.drop = drop
        if base_is_forgotten(model):
            folder = save_dropped_base(model, args.output_dir, write=args.should_save)
            logger.info("Saved the dropped base model in %s; its adapters are saved with that path.", folder)

    def on_train_begin(self, args: Any, state: Any, control: Any, model: nn.Module | None = None, **kwargs: Any) -> None:
        """See that the model to be trained is the dropped one, and the checkpoint's. Raises LayerDropError."""
        if model is None:
            return
        self._check(model)
        recorded = recorded_layers(pretrained_model(model).config) or {}
        if self.gradual is not None:
            self.gradual.check_start(args, model, state)
        elif self.request is not None:
            check_checkpoint(state, recorded, may_be_older=self.drop is None or self.drop.already_done)
        stored = getattr(state, "stateful_callbacks", None)
        if isinstance(stored, dict):  # The Trainer fails to save where a checkpoint's state knows nothing of a callback.
            stored.setdefault(type(self).__name__, self.state())

    def on_epoch_begin(
        self, args: Any, state: Any, control: Any, model: nn.Module | None = None, optimizer: Any = None, **kwargs: Any
    ) -> None:
        """With a schedule: drop the layers that go now, and take their parameters out of the optimizer."""
        if self.gradual is not None and model is not None:
            self.gradual.at_epoch(model, optimizer, int(state.epoch or 0))
            self.drop = self.gradual.drop

    def on_evaluate(self, args: Any, state: Any, control: Any, model: nn.Module | None = None, **kwargs: Any) -> None:
        """See that what was evaluated is the dropped model. Raises LayerDropError."""
        if model is not None:
            self._check(model)

    def on_predict(self, args: Any, state: Any, control: Any, *metrics: Any, model: nn.Module | None = None, **kwargs: Any) -> None:
        """See that what predicted is the dropped model. Raises LayerDropError."""
        if model is not None:
            self._check(model)

    def state(self) -> dict[str, Any]:
        """What trainer_state.json keeps: the arguments, and the layers that were kept."""
        written = dict(self.request.written()) if self.request is not None else {}
        arguments = {**written, "freeze_embeddings": self.freeze_embeddings, "layers_to_freeze": self.layers_to_freeze}
        kept = {name: list(stack.kept) for name, stack in self.drop.stacks.items()} if self.drop is not None else {}
        model = self._model() if self._model is not None else None
        if self.gradual is not None and model is not None:
            kept = {name: list(each.kept) for name, each in (recorded_layers(model.config) or {}).items()}
        return {
            "args": {name: list(value) if isinstance(value, tuple) else value for name, value in arguments.items()},
            "attributes": {"came_in_time": self.came_in_time, "kept": kept},
        }

    def _say_what_is_frozen(self, model: nn.Module) -> None:
        parts = ["embeddings"] if self.freeze_embeddings else []
        parts += [f"layers {describe_layers(tuple(sorted(self.layers_to_freeze)))} of the full model"] if self.layers_to_freeze else []
        if parts:
            trained = sum(num_elements(parameter) for parameter in model.parameters() if parameter.requires_grad) / 1e6
            whole = sum(map(num_elements, model.parameters())) / 1e6
            logger.info("frozen: %s; %.2fM of %.2fM parameters are trained before layers are dropped", " and ".join(parts), trained, whole)

    def _plan(self, args: Any, model: nn.Module, request: DropRequest) -> LayerDrop:
        done_before = recorded_drop(pretrained_model(model).config) is not None
        if done_before:
            refuse_other_layers(getattr(args, "resume_from_checkpoint", None), model)
        recorded = None if done_before else recorded_in_checkpoint(args)
        return plan_drop(model, request, None if recorded else self._batches(model), chosen_before=recorded)

    def _batches(self, model: nn.Module) -> Iterable[Mapping[str, Any]] | None:
        """What the contribution strategy measures on."""
        measures = self.request is not None and self.request.strategy == "contribution" and self._examples is not None
        return batches_of(self._examples or (), model, self._collator) if measures else None

    def _check(self, model: nn.Module) -> None:
        recorded = recorded_drop(pretrained_model(model).config) or {}
        is_dropped = bool(recorded) if self.request is None else self._matches(self.request, recorded)
        if self.gradual is not None and self.came_in_time:
            is_dropped = self._model is not None and self._model() is pretrained_model(model)
        if not self.came_in_time and (self.request is None or not is_dropped):
            raise LayerDropError(
                "LayerDropCallback was added when the Trainer had been made (add_callback), too late to drop or freeze layers. "
                "Pass it to the Trainer: Trainer(..., callbacks=[LayerDropCallback(...)])."
            )
        if self.request is not None and not is_dropped:
            raise LayerDropError(
                "The model has all its layers again: the Trainer's model_init has built it anew after LayerDropCallback dropped them. "
                "Drop the layers in model_init itself, by drop_layers(model, ...) with the same arguments, or pass model= instead."
            )
        freezes = self.freeze_embeddings or self.layers_to_freeze
        if freezes and self._model is not None and self._model() is not pretrained_model(model):
            raise LayerDropError(
                "The Trainer's model_init has built the model anew, and what was frozen can be trained again: "
                "pass model= instead of model_init=."
            )

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_model": None}  # a search in processes of its own builds another model there

    @staticmethod
    def _matches(request: DropRequest, recorded: Mapping[str, KeptLayers]) -> bool:
        names = [request.stack] if request.stack is not None else list(recorded)
        return bool(names) and all(name in recorded and request.matches(recorded[name]) for name in names)


def _check_optimizer(optimizer: Any, model: nn.Module, drop: LayerDrop) -> None:
    """Raise LayerDropError if an optimizer that was passed in holds parameters that are to be dropped."""
    groups = getattr(optimizer, "param_groups", None)
    if not groups:
        return
    gone = {id(parameter) for parameter in dropped_parameters(model, drop)}
    held = sum(id(parameter) in gone for group in groups for parameter in group["params"])
    if held:
        raise LayerDropError(
            f"The optimizer passed to the Trainer holds {held} parameters of layers that are to be dropped. Leave "
            "`optimizers` out, so that the "
            "Trainer makes one for what is left, or call drop_layers(model, ...) before you make the optimizer."
        )
