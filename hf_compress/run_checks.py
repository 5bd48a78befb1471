"""What a DistillTrainer refuses before it loads anything: runs that could not be right, and flags that would do nothing."""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from functools import partial
from typing import Any

from torch import nn
from transformers import DataCollatorForLanguageModeling, EarlyStoppingCallback

from hf_compress.adapter_off import AdapterOffTeacher
from hf_compress.arguments import LOSS_FLAGS, CompressionArguments, Phase
from hf_compress.deepspeed_configs import check_launched, named_config
from hf_compress.errors import ArgumentError, DataError, LossError, TeacherError
from hf_compress.fsdp import check_fsdp
from hf_compress.layers.record import recorded_layers
from hf_compress.layers.stack import pretrained_model
from hf_compress.layers.zero import num_elements
from hf_compress.losses.loss import Loss

logger = logging.getLogger(__name__)


def flags_in_force(given: CompressionArguments | None, args: Any, bound: CompressionArguments | None) -> CompressionArguments:
    """The flags passed in, those in `args`, or those that `hf-compress run` bound to the trainer's class.

    Raises:
        ArgumentError: if two of them say something, or `args` has a config that DeepSpeed would refuse once a teacher is loaded.
    """
    asked = getattr(args, "deepspeed", None)
    named_config(asked)
    check_launched(asked)
    own = args if isinstance(args, CompressionArguments) else None
    if given is not None:
        if own is not None and own is not given and own.given and given.given:
            raise ArgumentError(
                f"compression= says --{', --'.join(given.given)}, and args says --{', --'.join(own.given)}. Say it in one place: leave "
                "compression= out, and the flags in args count."
            )
        return given
    if own is not None and bound is not None and own is not bound and own.given and bound.given:
        raise ArgumentError(
            f"The script takes the flags of hf_compress itself, and gives --{', --'.join(own.given)}; `hf-compress run` was given "
            f"--{', --'.join(bound.given)} as well. Run this script without `hf-compress run`."
        )
    return next((flags for flags in (own, bound) if flags is not None and flags.given), own or bound or CompressionArguments())


def check_trainer_class(classes: Sequence[type], flags: CompressionArguments) -> None:
    """A script that makes its trainer itself cannot be told to take another.

    Args:
        classes: the trainer's class, and its parents up to DistillTrainer.
        flags: in force.

    Raises:
        ArgumentError: `--trainer_class` names none of the classes.
    """
    name = flags.trainer_class
    bound = any(vars(each).get("compression") is flags for each in classes[:-1])  # `hf-compress run` and our example made it so
    if name is None or bound or any(name in (each.__name__, f"{each.__module__}:{each.__qualname__}") for each in classes):
        return
    raise ArgumentError(
        f"--trainer_class {name} would have no effect: this script takes {classes[0].__name__} whatever the flag says. Leave it out. "
        "Without a teacher and the flags that begin with --distill_, that trains on the labels alone, as Trainer does."
    )


def check_teacher_and_losses(teacher: object, losses: object, *, from_disk: bool, nobody: str) -> None:
    """Refuse, before there is any data, a teacher that is no model, what is no list of losses, and losses without the teacher they need.

    Args:
        teacher: a model, the path of one, or the student with its adapters off.
        losses: as given; None for the recipe of the flags.
        from_disk: a finished teacher on disk answers instead of the model.
        nobody: what to say where there is no teacher.

    Raises:
        TeacherError, LossError: with the way out.
    """
    if teacher is not None and not isinstance(teacher, (str, nn.Module, AdapterOffTeacher)):
        raise TeacherError(f"teacher is {teacher!r}: expected a fine-tuned model, or the path of one as text.")
    _check_losses(losses)
    if teacher is not None or from_disk:
        return
    if losses is None:
        raise TeacherError(nobody)
    assert isinstance(losses, (list, tuple))
    names = [loss.name for loss in losses if loss.needs_teacher and loss.weight]
    if names:
        raise TeacherError(
            f"The losses {', '.join(names)} compare with a teacher, but none was given: --teacher_model_name_or_path, or "
            "DistillTrainer(teacher=model)."
        )


def _check_losses(losses: object) -> None:
    if losses is None:
        return
    if not isinstance(losses, (list, tuple)):
        example = f"losses=[{type(losses).__name__}(...)]" if isinstance(losses, Loss) else "losses=[LogitsLoss()]"
        raise LossError(f"losses is {losses!r}, and has to be a list of losses: {example}.")
    if not losses:
        raise LossError("losses is an empty list, so there is nothing to learn from. Leave it out for the recipe of the flags.")
    for each in losses:
        if not isinstance(each, Loss):
            raise LossError(
                f"losses holds {each!r}, which is no loss: in Python losses are objects, as in losses=[LogitsLoss(), "
                "LabelsLoss(weight=0.5)]; their names belong to the flags (--distill_weights)."
            )


def warn_of_same_model(student: nn.Module, teacher: nn.Module | None, path: str) -> None:
    """Say that a model is its own teacher, unless layers were dropped or are to go, or it was made smaller in another way."""
    if teacher is None or sum(map(num_elements, student.parameters())) != sum(map(num_elements, teacher.parameters())):
        return
    config = pretrained_model(student).config
    loaded = str(getattr(config, "_name_or_path", None) or "")
    same = bool(loaded) and (loaded == path or (os.path.isdir(loaded) and os.path.isdir(path) and os.path.samefile(loaded, path)))
    if same and recorded_layers(config) is None:
        logger.warning(
            "Teacher and student are both loaded from %s, so the student begins as its own teacher and has nothing to learn from it. "
            "Make a smaller student (`hf-compress student %s -o DIR --num_hidden_layers N`), or drop layers.",
            path,
            path,
        )


def check_flags(flags: CompressionArguments, *, losses_given: bool, teacher_given: bool) -> None:
    """Refuse flags that what was given in Python makes void.

    Raises:
        ArgumentError: naming them.
    """
    void = [name for name in LOSS_FLAGS if losses_given and getattr(flags, name) is not None]
    void += [
        name for name in ("teacher_revision", "teacher_dtype", "teacher_sharded") if teacher_given and getattr(flags, name) is not None
    ]
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
    check_fsdp(trainer)
    resumed = args.resume_from_checkpoint
    if isinstance(resumed, str) and resumed.lower() != "true" and not os.path.isdir(resumed):
        raise ArgumentError(f"--resume_from_checkpoint {resumed}: there is no such folder. Look into {args.output_dir} for what there is.")
    for name in ("gradient_checkpointing_kwargs", "activation_checkpointing_kwargs"):
        if (getattr(args, name, None) or {}).get("use_reentrant"):
            raise ArgumentError(f"{name} asks for use_reentrant=True, which hides the hidden states' gradients. Leave it out.")
    if any(_checkpoints_reentrantly(module) for module in trainer.model.modules()):
        raise ArgumentError(
            "The student's gradient checkpointing was switched on with use_reentrant=True, which hides the hidden states' gradients: "
            "model.gradient_checkpointing_enable() without arguments takes the other kind, and so does --gradient_checkpointing True."
        )
    masks_nothing = isinstance(trainer.data_collator, DataCollatorForLanguageModeling) and trainer.data_collator.mlm_probability == 0
    if masks_nothing and trainer.data_collator.mlm and trainer.eval_dataset is not None:
        raise ArgumentError(
            "The collator masks no word (--mlm_probability 0), so the evaluation has no labels, and its loss and perplexity would be NaN. "
            "Leave --do_eval and --eval_strategy out, and watch the losses of the training."
        )
    if not phases:
        return
    if not has_length:
        raise DataError("--distill_phases counts epochs, but the training data set has no length. Use --max_steps without phases.")
    if any(each.to_drop for each in (recorded_layers(pretrained_model(trainer.model).config) or {}).values()):
        raise ArgumentError(
            "--distill_phases begins to count epochs anew in each phase, and layers are to go by epochs (--layer_drop_every_n_epochs, "
            "--layer_drop_after_epochs). Leave one of them out."
        )
    if args.max_steps > 0:
        raise ArgumentError("--distill_phases counts epochs, and --max_steps would cut each phase short. Leave one of them out.")
    if trainer.model_init is not None:
        raise ArgumentError("--distill_phases trains one model on, but model_init builds a new one for each phase. Give the model.")
    if trainer.optimizer is not None or trainer.lr_scheduler is not None:
        raise ArgumentError("--distill_phases builds an optimizer and a schedule for each phase, so none can be passed in (optimizers=).")
    if any(isinstance(callback, EarlyStoppingCallback) for callback in trainer.callback_handler.callbacks):
        raise ArgumentError("EarlyStoppingCallback watches evaluation, and an intermediate phase has none. Leave one of them out.")


def _checkpoints_reentrantly(module: nn.Module) -> bool:
    function = getattr(module, "_gradient_checkpointing_func", None)
    switched_on = bool(getattr(module, "gradient_checkpointing", False))
    return switched_on and isinstance(function, partial) and bool(function.keywords.get("use_reentrant"))


def let_ddp_find_unused(args: Any) -> None:
    """Losses on some layers leave others, or the head, without a gradient, for which DDP would wait.

    transformers has DDP look for them but under gradient checkpointing, where that used to break the re-entrant kind; that kind is refused.
    """
    if args is not None and args.ddp_find_unused_parameters is None:
        args.ddp_find_unused_parameters = True


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
