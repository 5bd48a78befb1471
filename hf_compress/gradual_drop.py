"""Dropping layers while a Trainer trains, in the one model that it holds: what LayerDropCallback does at each epoch, and what it refuses.

    before epoch e      layers due? -> out of the model, in place -> their parameters out of the optimizer -> who compares layers is told
    checkpoints         config.json holds the stage; a run that is resumed brings its model to it before any weight is loaded

The Trainer keeps its references: model, optimizer and schedule of learning rates are the objects that they were. The moments of what
stays are not touched, and the learning rate goes on. DDP keeps buckets for what went; it finds them unused, as it does for any parameter
without a gradient. What splits parameters up (DeepSpeed, FSDP) or compiles the model once has no way to let layers go, and is refused.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

from accelerate.state import AcceleratorState
from torch import nn

from hf_compress.errors import LayerDropError
from hf_compress.layers.checkpoint import check_checkpoint, checkpoint_folder, refuse_other_layers
from hf_compress.layers.drop import LayerDrop
from hf_compress.layers.freeze import freeze
from hf_compress.layers.peft import adapter_configs
from hf_compress.layers.record import record_drop, recorded_layers
from hf_compress.layers.request import DropRequest
from hf_compress.layers.schedule import Record, before_its_first_drop, drop_next, due, last_epoch, plan_schedule, stage_of_checkpoint
from hf_compress.layers.stack import pretrained_model
from hf_compress.layers.strategies import describe_layers

logger = logging.getLogger(__name__)


class GradualDrop:
    """The schedule of one run.

    Args:
        request: what goes, and when.

    Attributes:
        drop: what the model has lost so far, counted in the full model; None before the first layer goes.
        after_drop: called, without arguments, whenever the model has lost layers.
    """

    def __init__(self, request: DropRequest) -> None:
        self.request = request
        self.drop: LayerDrop | None = None
        self.after_drop: list[Callable[[], None]] = []
        self._planned: Record = {}
        self._frozen: list[nn.Parameter] = []

    def plan(self, args: Any, model: nn.Module, optimizer: Any, batches: Iterable[Mapping[str, Any]] | None) -> None:
        """Choose the layers and their order, and see that this run can drop them. Raises LayerDropError; nothing is changed."""
        self.drop, self._frozen = None, []  # model_init may have built a new model
        checkpoint = getattr(args, "resume_from_checkpoint", None)
        measures = self.request.strategy == "contribution" and not recorded_layers(pretrained_model(model).config)
        saved = stage_of_checkpoint(checkpoint, self.request) if measures and isinstance(checkpoint, str) else None
        # What the run that is resumed has measured is not measured anew.
        self._planned = plan_schedule(model, self.request, batches) if saved is None else before_its_first_drop(saved)
        if last_epoch(self._planned) and not any(each.dropped for each in self._planned.values()):  # else it may only be evaluated
            refuse_run(args, model, optimizer, self._planned)

    def begin(self, model: nn.Module, checkpoint: Any = None) -> None:
        """Record what is to go, freeze it if it is to be frozen, and bring the model to the stage of the checkpoint that is resumed."""
        config = pretrained_model(model).config
        if last_epoch(self._planned):
            record_drop(config, self._planned)
            for name, each in self._planned.items():
                logger.info(
                    "%s%s of %d, to go in this order: %s",
                    "" if name == "layers" else f"{name}: ",
                    f"layers {describe_layers(each.kept)}",
                    each.num_layers,
                    ", ".join(map(str, each.to_drop)),
                )
            self._freeze(model)
            self.follow(model, checkpoint)
        else:
            logger.info("The model's config records this drop already. Nothing is changed.")

    def follow(self, model: nn.Module, checkpoint: Any, optimizer: Any = None) -> None:
        """Bring the model to the stage of a checkpoint, before its weights are loaded.

        Raises:
            LayerDropError: the checkpoint is of a run without this schedule.
        """
        config = pretrained_model(model).config
        if not isinstance(checkpoint, str) or not last_epoch(recorded_layers(config) or {}):
            return
        saved = stage_of_checkpoint(checkpoint, self.request)
        present = recorded_layers(config) or {}
        if saved is None or any(not set(each.kept) <= set(present[name].kept) for name, each in saved.items()):
            return  # the second: another checkpoint than of this model; `refuse_other_layers` says so
        self._thaw()
        gone = {name: tuple(layer for layer in present[name].kept if layer not in each.kept) for name, each in saved.items()}
        self._drop(model, optimizer, {name: layers for name, layers in gone.items() if layers})
        record_drop(config, saved)  # contribution may have been measured otherwise this time: the first run's choice counts
        self._freeze(model)

    def at_epoch(self, model: nn.Module, optimizer: Any, epochs: int) -> None:
        """Drop what is due when so many epochs are over."""
        record = {name: each for name, each in (recorded_layers(pretrained_model(model).config) or {}).items() if each.to_drop}
        self._drop(model, optimizer, due(record, epochs))

    def check_start(self, args: Any, model: nn.Module, state: Any) -> None:
        """See that a run that is resumed has its checkpoint's layers, and that one that begins is not in the middle of a schedule.

        Args:
            args: the training arguments.
            model: the Trainer's.
            state: the Trainer's, which holds what LayerDropCallback wrote if the run is resumed.

        Raises:
            LayerDropError: else.
        """
        recorded = recorded_layers(pretrained_model(model).config) or {}
        try:
            check_checkpoint(state, recorded, may_be_older=not last_epoch(recorded))
        except LayerDropError as error:
            raise LayerDropError(
                f"{error} Where the checkpoint is of this schedule: a plain Trainer has to know of it when it is made, by "
                "TrainingArguments(resume_from_checkpoint=...)."
            ) from error
        for each in recorded.values():
            if state.global_step == 0 and each.dropped and each.to_drop:
                raise LayerDropError(
                    f"The model is in the middle of its schedule (layers {describe_layers(each.kept)} of {each.num_layers}), and training "
                    "begins anew. Resume the run (--resume_from_checkpoint), start from the full model, or leave the schedule out to train "
                    "the model as it is."
                )
        if last_epoch(recorded):
            refuse_run(args, model, None, recorded)

    def _drop(self, model: nn.Module, optimizer: Any, layers: Mapping[str, tuple[int, ...]]) -> None:
        if not layers:
            return
        before = {id(parameter): parameter for parameter in model.parameters()}
        self.drop = drop_next(model, layers, self.request)
        for parameter in model.parameters():
            before.pop(id(parameter), None)
        if optimizer is not None:
            forget_parameters(optimizer, before.values())
        for told in self.after_drop:
            told()

    def _freeze(self, model: nn.Module) -> None:
        """Keep what is to go from being trained."""
        if not self.request.freeze_before_drop:
            return
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        several = len(recorded_layers(pretrained_model(model).config) or {}) > 1
        for name, each in (recorded_layers(pretrained_model(model).config) or {}).items():
            if each.to_drop:
                freeze(model, layers=each.to_drop, stack=name if several or self.request.stack is not None else None)
                logger.info("frozen until they go: layers %s of the full model", describe_layers(tuple(sorted(each.to_drop))))
        self._frozen = [parameter for parameter in trained if not parameter.requires_grad]

    def _thaw(self) -> None:
        for parameter in self._frozen:
            parameter.requires_grad_(True)
        self._frozen = []


def _schedules(callbacks: Iterable[Any]) -> Iterator[GradualDrop]:
    for callback in callbacks:
        gradual = getattr(callback, "gradual", None)
        if isinstance(gradual, GradualDrop):
            yield gradual


def tell_after_drop(callbacks: Iterable[Any], told: Callable[[], None]) -> None:
    """Have a function called whenever one of these callbacks has dropped layers while the model is trained."""
    for gradual in _schedules(callbacks):
        if told not in gradual.after_drop:
            gradual.after_drop.append(told)


def follow_checkpoint(
    callbacks: Iterable[Any], model: nn.Module, checkpoint: Any, *, output_dir: str | None = None, optimizer: Any = None
) -> None:
    """Before a checkpoint is loaded: bring the model to its stage, where layers go by a schedule, and see that both have the same layers.

    Args:
        callbacks: the Trainer's.
        model: with the layers that it has now.
        checkpoint: a folder, or True for the newest in `output_dir`; None where no run is resumed.
        output_dir: of the run.
        optimizer: the Trainer's, if there is one already.

    Raises:
        LayerDropError: naming both.
    """
    checkpoint = checkpoint_folder(checkpoint, output_dir)
    for gradual in _schedules(callbacks):
        gradual.follow(model, checkpoint, optimizer)
    refuse_other_layers(checkpoint, model)


def forget_parameters(optimizer: Any, gone: Iterable[nn.Parameter]) -> None:
    """Take parameters, and what an optimizer keeps of them, out of it, in place; the others keep their order and their state."""
    left_out = {id(parameter) for parameter in gone}
    inner = getattr(optimizer, "optimizer", optimizer)  # accelerate wraps it
    for group in inner.param_groups:
        group["params"][:] = [parameter for parameter in group["params"] if id(parameter) not in left_out]
    for parameter in [each for each in inner.state if id(each) in left_out]:
        del inner.state[parameter]


def refuse_run(args: Any, model: nn.Module, optimizer: Any, planned: Record) -> None:
    """See that a run can lose layers on its way.

    Args:
        args: the training arguments.
        model: the Trainer's.
        optimizer: one that was passed to the Trainer, or None.
        planned: the schedule.

    Raises:
        LayerDropError: with the reason and the way out.
    """
    last = last_epoch(planned)
    for holds, what, way_out in (
        *_ways_of_training(args, model),
        (
            optimizer is not None,
            "an optimizer was passed in (optimizers=), and a resumed run could not build it as it was",
            "Leave it out: --optim chooses one",
        ),
        (
            args.max_steps > 0,
            f"--max_steps {args.max_steps} ends by steps, and layers go by epochs",
            "Give --num_train_epochs in its place",
        ),
        (
            args.max_steps <= 0 and last >= args.num_train_epochs,
            f"the last layer would go after epoch {last}, and training ends after {args.num_train_epochs:g}",
            f"Train longer than {last} epochs (--num_train_epochs), or drop earlier or less",
        ),
        (
            args.load_best_model_at_end,
            "the best checkpoint may be one with layers that the model has no more (--load_best_model_at_end)",
            "Leave that out, and choose among the checkpoints: each is a whole model",
        ),
        (
            args.auto_find_batch_size,
            "--auto_find_batch_size may begin again with a model that has lost layers",
            "Give --per_device_train_batch_size",
        ),
        (
            bool(adapter_configs(model)),
            "the model has adapters (PEFT), whose base would change under the checkpoints",
            "Drop the layers before training: leave the epochs out, then add the adapter",
        ),
    ):
        if holds:
            raise LayerDropError(f"Layers cannot go while this run trains: {what}. {way_out}.")


def _ways_of_training(args: Any, model: nn.Module) -> Iterable[tuple[bool, str, str]]:
    instead = "Drop them before training instead: leave --layer_drop_every_n_epochs and --layer_drop_after_epochs out"
    kind = AcceleratorState().distributed_type.name  # the Trainer has made its Accelerator
    sharded = bool(args.fsdp) or any(hasattr(parameter, "device_mesh") for parameter in model.parameters())
    yield "DEEPSPEED" in kind, "DeepSpeed has laid all parameters out in buffers of its own", instead
    yield sharded or "FSDP" in kind, "FSDP has split all parameters up among the processes", instead
    several = kind != "NO"
    yield several and not kind.startswith("MULTI_") and not sharded, f"it is of the kind {kind}, for which that was not tried", instead
    yield bool(args.torch_compile) or hasattr(model, "_orig_mod"), "torch.compile has made one program of all its layers", instead
    checkpointing = args.gradient_checkpointing or bool(getattr(args, "activation_checkpointing", False))
    waits = args.ddp_find_unused_parameters is False or (args.ddp_find_unused_parameters is None and checkpointing)
    yield (
        several and (waits or bool(args.ddp_static_graph)),
        "DDP would wait for the gradients of layers that are gone",
        "Give --ddp_find_unused_parameters True, and leave --ddp_static_graph out",
    )
