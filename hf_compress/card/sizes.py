"""How large a model is, for its card."""

from __future__ import annotations

import os
from dataclasses import dataclass

import torch
from torch import nn

from hf_compress.cache.manifest import TeacherIdentity
from hf_compress.errors import CompressionError
from hf_compress.layers.record import recorded_drop
from hf_compress.layers.stack import find_stacks, pretrained_model, unwrap
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
        number = _numel(parameter)
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


def size_before_dropping(model: nn.Module) -> Size | None:
    """The size of the full model, before layers were dropped of it; None where none were, or where its layers are not all alike."""
    recorded = recorded_drop(pretrained_model(model).config)
    if not recorded:
        return None
    size, stacks = size_of(model), find_stacks(model)
    assert size.parameters is not None and size.size is not None
    gone = 0
    for name, kept in recorded.items():
        layers = {sum(map(_numel, module.parameters())) for module in stacks[name].modules}
        if len(layers) != 1:
            return None
        gone += 0 if stacks[name].shared else layers.pop() * len(kept.dropped)
    whole = size.parameters + gone
    return Size(size.words, whole, round(size.size * whole / size.parameters), size.dtype)


def size_rows(model: Size, other: Size | None, whose: str = "the teacher") -> dict[str, str]:
    """The rows of a card's table: parameters and bytes, beside those of what the model is measured against, where they are known."""
    assert model.parameters is not None and model.size is not None
    parameters, size = f"{model.parameters:,}", f"{_megabytes(model.size)} in {model.dtype}"
    if other is not None and other.parameters and other.size:
        parameters += f" of {whose}'s {other.parameters:,}: {_share(model.parameters, other.parameters)}"
        size += f", {whose} {_megabytes(other.size)} in {other.dtype}: {_share(model.size, other.size)}"
    return {"parameters": parameters, "size": size}


def _numel(parameter: nn.Parameter) -> int:
    """Of the whole parameter, of which ZeRO-3 holds a part here."""
    return int(getattr(parameter, "ds_numel", parameter.numel()))


def _share(part: int, whole: int) -> str:
    return f"{part / whole:.1%}, {whole / part:.1f} times smaller" if part < whole else f"{part / whole:.1%}"


def _megabytes(size: int) -> str:
    return f"{size / 1e6:,.1f} MB" if size >= 1e5 else f"{size:,} bytes"


def _class_name(model: nn.Module) -> str:
    return type(pretrained_model(model)).__name__


def _stack_words(name: str, num_layers: int, hidden_size: int, heads: int) -> str:
    where = "" if name == "layers" else f" ({name})"
    return f"{num_layers} layer{'s' if num_layers > 1 else ''} x {hidden_size}{where}" + (f", {heads} heads" if heads else "")
