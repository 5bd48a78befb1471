"""What a Trainer writes of a student: a plain model that `from_pretrained` loads, and beside it what only a run needs."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

from hf_compress.distillation import Distillation
from hf_compress.layers.peft import base_is_forgotten, save_dropped_base
from hf_compress.layers.stack import pretrained_model
from hf_compress.layers.zero import forget_unused_renamings


@contextmanager
def written_plainly(student: nn.Module, distillation: Distillation | None, args: Any, folder: str | None) -> Iterator[None]:
    """While a Trainer saves the student: without its projections, which go into a file of their own.

    Args:
        student: the model.
        distillation: whose projections these are; None where nothing is distilled.
        args: the training arguments.
        folder: where it goes; None for the output folder.
    """
    forget_unused_renamings(pretrained_model(student))
    if base_is_forgotten(student):  # adapters over layers that were dropped are of use with that base only
        save_dropped_base(student, str(args.output_dir), write=args.should_save)
    if distillation is None:
        yield
        return
    with distillation.projections.left_out(student):
        yield
    distillation.projections.save(str(folder or args.output_dir), write=args.should_save)
