"""How large a model is, for its card."""

from __future__ import annotations

import os
from dataclasses import dataclass

import torch
from torch import nn

from hf_compress.cache.manifest import TeacherIdentity
from hf_compress.errors import CompressionError
from hf_compress.layers.stack import pretrained_model, unwrap
from hf_compress.projections import ATTRIBUTE
from hf_compress.task import ModelShape
from hf_compress.without_weights import model_without_weights


@dataclass(frozen=True)
class Size:
    """A model in numbers.

    Attributes:
        words: as in "BertForSequenceClassification, 4 layers x 312, 12 heads".
        parameters: their number, each counted once; None where it is not known.
        size: bytes of the parameters in memory; None where they are not known.
        dtype: the number format of most of them, as in "float32".
    """

    words: str
    parameters: int | None = None
    size: int | None = None
    dtype: str = "float32"


def size_of(model: nn.Module) -> Size:
    """Measure a model: all its parameters but the projections that distilling adds; whole numbers under ZeRO-3 too."""
    counted, formats = [], dict[str, int]()
    for name, parameter in unwrap(model).named_parameters():
        if ATTRIBUTE in name.split("."):
            continue
        number = int(getattr(parameter, "ds_numel", parameter.numel()))
        counted.append((number, number * parameter.element_size()))
        dtype = str(parameter.dtype).removeprefix("torch.")
        formats[dtype] = formats.get(dtype, 0) + number
    words = _class_name(model)
    try:
        shape = ModelShape.of(model)
        words += ", " + ", ".join(
            _stack_words(name, stack.num_layers, stack.hidden_size, stack.num_attention_heads) for name, stack in shape.stacks.items()
        )
    except CompressionError:
        pass  # no stack of layers is found in it; its name has to do
    most = max(formats, key=lambda name: formats[name], default="float32")
    return Size(words, sum(number for number, _ in counted), sum(size for _, size in counted), most)


def size_of_stored(teacher: TeacherIdentity, path: str) -> Size:
    """What is known of the teacher of a cache; its parameters are counted where its folder is still on this machine.

    Args:
        teacher: as the manifest has it.
        path: where the teacher is, or was.
    """
    words = ", ".join(
        [teacher.model_class]
        + [
            _stack_words(name, each["num_layers"], each["hidden_size"], each["num_attention_heads"])
            for name, each in teacher.stacks.items()
        ]
    )
    if os.path.isdir(path):
        try:
            empty: nn.Module = model_without_weights(path)
        except CompressionError:
            return Size(words, dtype=teacher.dtype)
        if _class_name(empty) == teacher.model_class:
            found = size_of(empty.to(getattr(torch, teacher.dtype.partition(",")[0])))
            return Size(words, found.parameters, found.size, found.dtype)
    return Size(words, dtype=teacher.dtype)


def size_rows(student: Size, teacher: Size | None) -> dict[str, str]:
    """The rows of a card's table: parameters and bytes, beside the teacher's where they are known."""
    assert student.parameters is not None and student.size is not None
    parameters, size = f"{student.parameters:,}", f"{_megabytes(student.size)} in {student.dtype}"
    if teacher is not None and teacher.parameters and teacher.size:
        parameters += f" of the teacher's {teacher.parameters:,}: {_share(student.parameters, teacher.parameters)}"
        size += f", the teacher {_megabytes(teacher.size)} in {teacher.dtype}: {_share(student.size, teacher.size)}"
    return {"parameters": parameters, "size": size}


def _share(part: int, whole: int) -> str:
    return f"{part / whole:.1%}, {whole / part:.1f} times smaller" if part < whole else f"{part / whole:.1%}"


def _megabytes(size: int) -> str:
    return f"{size / 1e6:,.1f} MB" if size >= 1e5 else f"{size:,} bytes"


def _class_name(model: nn.Module) -> str:
    return type(pretrained_model(model)).__name__


def _stack_words(name: str, num_layers: int, hidden_size: int, heads: int) -> str:
    where = "" if name == "layers" else f" ({name})"
    return f"{num_layers} layer{'s' if num_layers > 1 else ''} x {hidden_size}{where}" + (f", {heads} heads" if heads else "")
