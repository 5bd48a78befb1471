"""Where a live teacher stands: whole on the student's device if it fits there, or split up by ZeRO-3 with an engine of its own.

--teacher_model_name_or_path          whole on each process, under ZeRO-3 too      refused where the device has no room for it
the same with --teacher_sharded       a part on each process, gathered layer by layer in its forward
DistillTrainer(teacher=model)         as it comes: a model that was loaded under a config of ZeRO-3 is split already
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from hf_compress.cache.price import readable
from hf_compress.errors import ArgumentError, TeacherError
from hf_compress.layers.zero import config_in_force, is_split_by_zero
from hf_compress.signals import SignalSource
from hf_compress.teacher import LiveTeacher

# Where a split model keeps its engine; no submodule, and no part of its state.
_ENGINE = "_hf_compress_engine"


def check_sharding(wanted: bool, *, goes_to_disk: bool) -> None:
    """See that a run can split its teacher up, before it is loaded.

    Args:
        wanted: `--teacher_sharded`.
        goes_to_disk: a teacher on disk is to be built from it.

    Raises:
        ArgumentError: if it cannot.
    """
    if not wanted:
        return
    if config_in_force() is None:
        raise ArgumentError(
            "--teacher_sharded splits the teacher up by DeepSpeed's ZeRO-3, and this run has none. Add --deepspeed zero3, or leave it out."
        )
    if goes_to_disk:
        raise ArgumentError(
            "--teacher_sharded: a teacher on disk is built from a whole teacher on each process, since the processes ask it for other "
            "numbers of batches. Leave --teacher_sharded out, and where the teacher does not fit, add --teacher_dtype bfloat16 or build "
            "the cache on the CPU (--use_cpu --build_teacher_cache_only)."
        )


def refuse_split(teacher: nn.Module | None) -> None:
    """A teacher that was handed over split up can be neither stored nor compared with what was stored.

    Raises:
        TeacherError: with the way out.
    """
    if teacher is not None and is_split_by_zero(teacher):
        raise TeacherError(
            "The teacher that was handed over is split up by ZeRO-3 (its parameters have the shape (0,) on each process), and a teacher "
            "on disk needs a whole one. Give its path instead of the model (--teacher_model_name_or_path, or teacher='...'), or load it "
            "before TrainingArguments(deepspeed=...) is made."
        )


def placed(source: SignalSource | None, student: nn.Module, device: torch.device) -> SignalSource | None:
    """The teacher, where it can answer.

    Args:
        source: who answers; only a live teacher is moved.
        student: to be trained beside it.
        device: the student's.

    Raises:
        TeacherError: the device has no room for it.
    """
    if not isinstance(source, LiveTeacher):
        return source
    if is_split_by_zero(source.model):
        _give_engine(source.model)
    else:
        refuse_too_large(source.model, student, device, free_bytes(device))
    return source.to(device)


def free_bytes(device: torch.device) -> int | None:
    """What a GPU has left for this process, what torch holds without using it included; None where the device is none."""
    if device.type != "cuda":
        return None
    free, _ = torch.cuda.mem_get_info(device)
    return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)


def refuse_too_large(teacher: nn.Module, student: nn.Module, device: torch.device, free: int | None) -> None:
    """See that teacher and student have room on the device; gradients, optimizer and activations come on top.

    Args:
        teacher, student: what is on the device already is not counted.
        device: where they go.
        free: bytes; None where that is not known.

    Raises:
        TeacherError: if they have not.
    """
    if free is None:
        return
    of_teacher, of_student = (_bytes_elsewhere(model, device) for model in (teacher, student))
    if of_teacher + of_student <= free:
        return
    beside = f", the student's {readable(of_student)}" if of_student else ""
    raise TeacherError(
        f"The teacher does not fit: its weights take {readable(of_teacher)}{beside}, and {device} has {readable(free)} left. "
        "Ways out: --teacher_dtype bfloat16 halves a float32 teacher; a teacher on disk is not in memory while the student trains "
        "(--teacher_cache_dir, built where it fits, with --build_teacher_cache_only); under --deepspeed zero3 each process holds a part "
        "of it (--teacher_sharded)."
    )


def _bytes_elsewhere(model: nn.Module, device: torch.device) -> int:
    """Of weights and buffers that are not on the device; one that is used twice counts once."""
    if getattr(model, "is_quantized", False) or getattr(model, "hf_device_map", None) is not None:
        return 0  # stays where it was loaded
    tensors = {id(each): each for each in (*model.parameters(), *model.buffers()) if each.device.type != device.type}
    return sum(each.numel() * each.element_size() for each in tensors.values())


def _give_engine(model: nn.Module) -> None:
    """Have an engine of DeepSpeed gather the model's layers in its forward; its own, since the student's owns the training."""
    if hasattr(model, _ENGINE):
        return
    config = config_in_force()
    if config is None:
        raise TeacherError(
            "The teacher is split up by ZeRO-3, and this run has no config of ZeRO-3. Add --deepspeed zero3, or load it without one."
        )
    import deepspeed

    run: dict[str, Any] = config.config
    zero = {
        name: value
        for name, value in run["zero_optimization"].items()
        if value != "auto" and name not in ("offload_optimizer", "stage3_gather_16bit_weights_on_model_save")
    }
    settings: dict[str, Any] = {name: run[name] for name in ("bf16", "fp16") if name in run}
    settings |= {"zero_optimization": zero, "train_micro_batch_size_per_gpu": 1, "steps_per_print": 1 << 62}
    engine, *_ = deepspeed.initialize(model=model, config=settings)
    object.__setattr__(model, _ENGINE, engine)
