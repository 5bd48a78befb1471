"""What a DistillTrainer refuses before it loads anything: runs that could not be right, and flags that would do nothing."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn
from transformers import EarlyStoppingCallback

from hf_compress.arguments import CompressionArguments, Phase
from hf_compress.errors import ArgumentError, DataError

# The flags that say what is compared.
LOSS_FLAGS = ("distill_recipe", "distill_temperature", "distill_weights", "distill_layer_map", "distill_skip_heads")


def flags_in_force(given: CompressionArguments | None, args: Any, bound: CompressionArguments | None) -> CompressionArguments:
    """The flags passed in, those in `args`, or those that `hf-compress run` bound to the trainer's class.

    Raises:
        ArgumentError: if the last two both say something.
    """
    if given is not None:
        return given
    own = args if isinstance(args, CompressionArguments) else None
    if own is not None and bound is not None and own is not bound and own.given and bound.given:
        raise ArgumentError(
            f"The script takes --{', --'.join(own.given)} itself, and `hf-compress run` was given --{', --'.join(bound.given)}. "
            "Run this script without `hf-compress run`."
        )
    return next((flags for flags in (own, bound) if flags is not None and flags.given), own or bound or CompressionArguments())


def check_flags(flags: CompressionArguments, *, losses_given: bool, teacher_given: bool) -> None:
    """Refuse flags that what was given in Python makes void.

    Raises:
        ArgumentError: naming them.
    """
    void = [name for name in LOSS_FLAGS if losses_given and getattr(flags, name) is not None]
    void += [name for name in ("teacher_revision", "teacher_dtype") if teacher_given and getattr(flags, name) is not None]
    if void:
        raise ArgumentError(f"--{', --'.join(void)} would have no effect: losses or teacher are given in Python. Say it in one place.")


def check_run(trainer: Any, phases: Sequence[Phase]) -> None:
    """Refuse what cannot be trained right.

    Args:
        trainer: a transformers Trainer after its own set-up.
        phases: of the distillation.

    Raises:
        DataError, ArgumentError: with the way out.
    """
    args, data = trainer.args, trainer.train_dataset
    has_length = hasattr(data, "__len__")
    if has_length and len(data) == 0:
        raise DataError("The training data set is empty. Look at the file, and at --max_train_samples.")
    if args.n_gpu > 1:
        raise ArgumentError(
            f"{args.n_gpu} GPUs in one process (DataParallel) are not supported: torchrun --nproc_per_node {args.n_gpu} "
            "starts one process for each, and is faster; or choose one GPU with CUDA_VISIBLE_DEVICES=0."
        )
    for name in ("gradient_checkpointing_kwargs", "activation_checkpointing_kwargs"):
        if (getattr(args, name, None) or {}).get("use_reentrant"):
            raise ArgumentError(f"{name} asks for use_reentrant=True, which hides the hidden states' gradients. Leave it out.")
    if not phases:
        return
    if not has_length:
        raise DataError("--distill_phases counts epochs, but the training data set has no length. Use --max_steps without phases.")
    if args.max_steps > 0:
        raise ArgumentError("--distill_phases counts epochs, and --max_steps would cut each phase short. Leave one of them out.")
    if trainer.model_init is not None:
        raise ArgumentError("--distill_phases trains one model on, but model_init builds a new one for each phase. Give the model.")
    if trainer.optimizer is not None or trainer.lr_scheduler is not None:
        raise ArgumentError("--distill_phases builds an optimizer and a schedule for each phase, so none can be passed in (optimizers=).")
    if any(isinstance(callback, EarlyStoppingCallback) for callback in trainer.callback_handler.callbacks):
        raise ArgumentError("EarlyStoppingCallback watches evaluation, and an intermediate phase has none. Leave one of them out.")


def check_optimizer(optimizer: Any, projections: nn.Module) -> None:
    """An optimizer that was passed in was made before there were projections.

    Raises:
        ArgumentError: if it lacks one that is to be trained.
    """
    if optimizer is None:
        return
    held = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    if any(id(parameter) not in held for parameter in projections.parameters()):
        raise ArgumentError(
            "The optimizer that was passed in (optimizers=) does not hold the projections that this run has to train, since the widths of "
            "student and teacher differ. Leave it out (--optim chooses one), or use losses without hidden states."
        )
