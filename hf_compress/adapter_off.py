"""Self-distillation: the student's own base, its adapters switched off, is the teacher. One model in memory, and one set of weights.

    step:   teacher.signals(batch)    the base's forward: adapters off, eval mode, no gradients, hooks of its own
            student(batch)            adapters on, train mode, as if nothing had been

What an adapter learns from the labels may cost what the base knew; the base says what that was. It can teach no more than that: without a
loss on the labels, the student is told to stay as it is, and such a run is refused.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, TypeGuard

import torch
from torch import Tensor, nn

from hf_compress.arguments import CompressionArguments
from hf_compress.capture import Capture
from hf_compress.errors import ArgumentError, TeacherError
from hf_compress.layers.peft import adapter_configs
from hf_compress.layers.record import recorded_drop
from hf_compress.layers.stack import pretrained_model
from hf_compress.losses.labels import LabelsLoss
from hf_compress.losses.loss import Loss
from hf_compress.signals import Signals, SignalSpec
from hf_compress.task import ModelShape
from hf_compress.teacher import input_columns
from hf_compress.teacher_side import TeacherSide, recipe_of

logger = logging.getLogger(__name__)

# In place of a model's name: `--teacher_model_name_or_path adapter_off`.
ADAPTER_OFF = "adapter_off"


class AdapterOffTeacher:
    """A PEFT model as its own teacher: what its base says, with the adapters switched off for the moment.

    The student stays as it is: which of its modules are in train mode, which parameters have gradients, its random numbers and its hooks.
    The forward is the plain model's own, not that of a DDP wrapper, and not compiled.

    Args:
        model: the student, a `PeftModel` whose adapters leave the base alone (LoRA and its kin; `modules_to_save` is fine).

    Raises:
        TeacherError: it has no adapters, or they cannot be switched off: prompts, biases or other weights of the base that are trained.

    Example:
        >>> trainer = DistillTrainer(model, args, teacher=AdapterOffTeacher(model), losses=[LogitsLoss(), LabelsLoss()],
        ...                          train_dataset=train)  # doctest: +SKIP
    """

    def __init__(self, model: nn.Module) -> None:
        configs = adapter_configs(model)
        get_base_model: Any = getattr(model, "get_base_model", None)
        if not configs or not callable(get_base_model):
            raise TeacherError(
                f"{type(model).__name__} has no adapters to switch off: give DistillTrainer a PEFT model (peft.get_peft_model), or name a "
                "teacher of its own."
            )
        for name, config in configs.items():
            if getattr(config, "is_prompt_learning", False) or getattr(config, "is_adaption_prompt", False):
                raise TeacherError(
                    f"The adapter {name!r} ({config.peft_type}) puts prompts into the model and cannot be switched off: take LoRA."
                )
        self.model = model
        self.base: nn.Module = get_base_model()
        self.columns = input_columns(self.base)
        # PEFT's layers and its wrappers of whole modules have these two in common.
        self._parts: list[Any] = [
            each for each in self.base.modules() if hasattr(each, "adapter_layer_names") and hasattr(each, "enable_adapters")
        ]
        _refuse_trained_base(self.base, self._parts)
        # Listed once: walking through a deep model with adapters takes longer than switching them.
        self._modules = list(self.base.modules())
        self._parameters = [parameter for part in self._parts for parameter in part.parameters()]
        self._capture: Capture | None = None

    def close(self) -> None:
        """Take the hooks off the model; the next call of `signals` puts them on again."""
        if self._capture is not None:
            self._capture.remove()

    def signals(self, inputs: Mapping[str, Tensor], spec: SignalSpec) -> Signals:
        """Ask the base.

        Args:
            inputs: a batch; columns that the model does not know are left out.
            spec: the layers to show; hooks stay on the model until another spec comes, or `close`.
        """
        if self._capture is None or self._capture.spec != spec or not self._capture.attached:
            self.close()
            self._capture = Capture(self.base, spec, only_in_training=False)
        capture = self._capture
        with self._as_a_teacher(), torch.no_grad():
            capture.paused = False
            try:
                outputs: Mapping[str, Any] = self.base(**{name: value for name, value in inputs.items() if name in self.columns})
            finally:
                capture.paused = True
        # Where the embeddings' output is made to require gradients (for checkpointing over a frozen base), it does so here as well.
        return capture.signals(outputs).moved(Tensor.detach)

    @contextmanager
    def _as_a_teacher(self) -> Iterator[None]:
        """Adapters off and eval mode; everything is put back as it was, module by module."""
        training = [module for module in self._modules if module.training]
        enabled = [part for part in self._parts if not part.disable_adapters]
        # Switching adapters on and off sets requires_grad of all of their weights, also of those that somebody froze.
        wanted = [parameter.requires_grad for parameter in self._parameters]
        try:
            for module in training:
                module.training = False
            for part in enabled:
                part.enable_adapters(False)
            yield
        finally:
            for part in enabled:
                part.enable_adapters(True)
            for parameter, value in zip(self._parameters, wanted, strict=True):
                parameter.requires_grad_(value)
            for module in training:
                module.training = True


def asks_adapter_off(teacher: object) -> TypeGuard[AdapterOffTeacher | str]:
    """Whether a run's teacher is its student with the adapters off."""
    return isinstance(teacher, AdapterOffTeacher) or teacher == ADAPTER_OFF


def adapter_off_side(
    student: nn.Module,
    teacher: Any,
    flags: CompressionArguments,
    losses: Sequence[Loss] | None,
    *,
    is_fsdp: bool = False,
    alone: bool = True,
) -> TeacherSide:
    """The teacher's side of a run whose teacher is the student with its adapters off.

    Args:
        student: a PEFT model.
        teacher: an `AdapterOffTeacher` of this very student; or the word for it.
        flags: the run's.
        losses: those given in Python; None for the recipe of the flags.
        is_fsdp: whether the run shards its model with FSDP.
        alone: whether nobody else teaches; then the labels must.

    Raises:
        TeacherError: the student cannot be its own teacher, see `AdapterOffTeacher`; or the teacher is of another model.
        ArgumentError: flags of a teacher that is loaded or stored, no loss on the labels, or FSDP.
    """
    if is_fsdp:
        raise ArgumentError(
            "The teacher is the student with its adapters off, and FSDP lets nobody call the model inside it. Train with DDP or with "
            "DeepSpeed, or name the base as --teacher_model_name_or_path."
        )
    source = teacher if isinstance(teacher, AdapterOffTeacher) else AdapterOffTeacher(student)
    if source.model is not student:
        raise TeacherError("AdapterOffTeacher is of another model than the one that is trained. Make it of that: AdapterOffTeacher(model).")
    void = [name for name in ("teacher_cache_dir", "teacher_dtype", "teacher_revision") if getattr(flags, name) is not None]
    if void:
        raise ArgumentError(
            f"--{', --'.join(void)}: the teacher is the student with its adapters off, neither loaded nor stored. Leave that out, or "
            "name the base itself as --teacher_model_name_or_path."
        )
    chosen = list(losses) if losses is not None else recipe_of(flags, {})
    if alone and not any(isinstance(loss, LabelsLoss) and loss.weight for loss in chosen):
        raise ArgumentError(
            "The teacher is the student with its adapters off, and no loss reads the labels: it would learn to be what it is without "
            "them. Add the labels: --distill_recipe logits, --distill_weights labels=1, or LabelsLoss() in losses=."
        )
    if flags.wants_layer_drop:
        raise ArgumentError(
            "The teacher is the student with its adapters off, and this run drops layers of it: the teacher would lack them too, and could "
            "not teach what they knew. Name the whole model as --teacher_model_name_or_path."
        )
    if recorded_drop(pretrained_model(student).config):
        logger.warning(
            "The teacher is the student with its adapters off, and layers of that were dropped: it can keep the student from forgetting "
            "more, and not give back what the layers knew. For that, name the whole model as the teacher."
        )
    return TeacherSide(source, ModelShape.of(student), chosen)


def _refuse_trained_base(base: nn.Module, parts: Sequence[Any]) -> None:
    """What is trained must be part of an adapter, or the base would change with the student."""
    own = {
        id(parameter)
        for part in parts
        for name in part.adapter_layer_names
        if isinstance(module := getattr(part, name, None), nn.Module)
        for parameter in module.parameters()
    }
    outside = [name for name, parameter in base.named_parameters() if parameter.requires_grad and id(parameter) not in own]
    if outside:
        raise TeacherError(
            f"{len(outside)} weights of the base are trained beside the adapters, such as {outside[0]}, so switching the adapters off does "
            "not give the base back. Freeze them (LoraConfig(bias='none')), let the adapter hold them (modules_to_save), or name a teacher "
            "of its own."
        )
