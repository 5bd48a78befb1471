"""A General TinyBERT checkpoint, as it was published (huawei-noah/TinyBERT_General_4L_312D), becomes a student.

    config.json          BERT's sizes, and no model_type, so AutoConfig cannot read it
    pytorch_model.bin    bert.*         the encoder; its norms may have BERT's first names, gamma and beta
                         fit_dense.*    the learnt projection to the teacher's width: where the student's projection starts
                         fit_denses.N.* in its place, in the second version: one for each layer, and N = 0 for the embeddings
                         cls.*          a head that general distillation does not train: left out
    vocab.txt            the vocabulary

The weights are read as tensors alone (`weights_only`): nothing that a pickle could execute is executed.
"""

from __future__ import annotations

import json
import pickle
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor
from transformers import BertConfig, BertModel, BertTokenizer
from transformers.utils.hub import cached_file

from hf_compress.errors import ArgumentError
from hf_compress.layers.stack import find_stacks
from hf_compress.projection_file import layer_projection, shared_projection, write_projections
from hf_compress.students.save import check_output_dir

_SIZES = (
    "vocab_size",
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "intermediate_size",
    "max_position_embeddings",
    "type_vocab_size",
)
_SETTINGS = ("hidden_act", "hidden_dropout_prob", "attention_probs_dropout_prob", "initializer_range", "layer_norm_eps")
_WEIGHTS = ("model.safetensors", "pytorch_model.bin")
_OLD_NAMES = {"LayerNorm.gamma": "LayerNorm.weight", "LayerNorm.beta": "LayerNorm.bias"}
_PROJECTION = "fit_dense"
_PROJECTIONS = "fit_denses"


@dataclass(frozen=True)
class GeneralTinyBert:
    """What was read of such a checkpoint.

    Attributes:
        model: the encoder.
        tokenizer: of its vocabulary.
        projections: of each, weight (teacher's width, width) and bias (teacher's width,): the one that all layers share, or one each, the
            embeddings' first.
    """

    model: BertModel
    tokenizer: BertTokenizer
    projections: tuple[tuple[Tensor, Tensor], ...]

    def save(self, output_dir: str | Path) -> None:
        """Write a student that `from_pretrained` loads, and its projections, from which a distilling run starts."""
        check_output_dir(output_dir, None)
        self.model.save_pretrained(output_dir)
        self.tokenizer.save_pretrained(output_dir)
        (stack,) = find_stacks(self.model)
        shared = len(self.projections) == 1
        names = [shared_projection(stack)] if shared else [layer_projection(stack, layer) for layer in range(len(self.projections))]
        pairs = list(zip(names, self.projections, strict=True))
        write_projections(
            output_dir,
            {f"{name}.weight": weight for name, (weight, _) in pairs} | {f"{name}.bias": bias for name, (_, bias) in pairs},
            {"student": self.model.config.model_type, "student_hidden_size": str(self.model.config.hidden_size)},
        )


def is_general_tinybert(name_or_path: str) -> bool:
    """Whether a folder, or a model of the hub, has a config of that kind: BERT's sizes, and no word of which model it is."""
    values = _config(name_or_path)
    return values is not None and "model_type" not in values and set(_SIZES[:5]) <= values.keys()


def read_general_tinybert(name_or_path: str) -> GeneralTinyBert:
    """Read such a checkpoint.

    Args:
        name_or_path: a folder, or the name of a model on the hub.

    Raises:
        ArgumentError: a file is missing or damaged, a weight is missing (all are named) or of another size than the config says (with
            both), or the vocabulary is.
    """
    values = _config(name_or_path)
    if values is None:
        raise ArgumentError(f"There is no config.json in {name_or_path}.")
    config = _bert_config(name_or_path, values)
    tensors = _tensors(name_or_path)
    model = BertModel(config)
    expected = {f"bert.{name}": tensor.shape for name, tensor in model.state_dict().items()}
    names = _projections(tensors, config.num_hidden_layers)
    outputs = _teacher_width(tensors, names[0])
    for name in names:
        expected |= {f"{name}.weight": torch.Size((outputs, config.hidden_size)), f"{name}.bias": torch.Size((outputs,))}
    _compare(name_or_path, expected, tensors)
    model.load_state_dict({name: tensors[f"bert.{name}"] for name in model.state_dict()})
    tokenizer = _tokenizer(name_or_path, config.vocab_size)
    model.train(False)
    return GeneralTinyBert(model, tokenizer, tuple((tensors[f"{name}.weight"].float(), tensors[f"{name}.bias"].float()) for name in names))


def _file(name_or_path: str, name: str) -> Path | None:
    """Where a file of the checkpoint lies on this machine, downloaded if need be; None where there is none."""
    if Path(name_or_path).is_dir():
        path = Path(name_or_path) / name
        return path if path.is_file() else None
    try:
        found = cached_file(name_or_path, name)
    except (OSError, ValueError):
        return None
    return None if found is None else Path(found)


def _config(name_or_path: str) -> dict[str, Any] | None:
    path = _file(name_or_path, "config.json")
    if path is None:
        return None
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except ValueError:
        return None
    return values if isinstance(values, dict) else None


def _bert_config(name_or_path: str, values: dict[str, Any]) -> BertConfig:
    for name in _SIZES:
        size = values.get(name)
        if not isinstance(size, int) or isinstance(size, bool) or size < 1:
            raise ArgumentError(f"config.json of {name_or_path} says {name} is {size!r}; expected a whole number from 1 up.")
    width, heads = values["hidden_size"], values["num_attention_heads"]
    if width % heads:
        raise ArgumentError(f"config.json of {name_or_path} has {heads} attention heads, which do not divide its hidden_size {width}.")
    return BertConfig(**{name: values[name] for name in (*_SIZES, *_SETTINGS) if name in values})


def _tensors(name_or_path: str) -> dict[str, Tensor]:
    """The weights by name, old names replaced."""
    path = next((found for name in _WEIGHTS if (found := _file(name_or_path, name)) is not None), None)
    if path is None:
        raise ArgumentError(f"There are no weights in {name_or_path}: neither {' nor '.join(_WEIGHTS)}.")
    try:
        loaded = load_file(path) if path.suffix == ".safetensors" else torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, RuntimeError, ValueError, EOFError, KeyError, pickle.UnpicklingError, SafetensorError) as error:
        reason = " ".join(str(error).split())[:200]
        raise ArgumentError(
            f"{path} cannot be read as weights: it is cut off, or holds more than tensors, and what a pickle holds beside them is not "
            f"executed ({reason}). Download it again."
        ) from error
    if not isinstance(loaded, dict) or not all(isinstance(tensor, Tensor) for tensor in loaded.values()):
        raise ArgumentError(f"{path} holds no weights by name, but a {type(loaded).__name__}. Expected the state_dict of a model.")
    tensors = {}
    for name, tensor in loaded.items():
        old = next((each for each in _OLD_NAMES if name.endswith(each)), None)
        tensors[name if old is None else name.removesuffix(old) + _OLD_NAMES[old]] = tensor
    return tensors


def _projections(tensors: dict[str, Tensor], num_layers: int) -> list[str]:
    """What the projections are called: the one that all share, or one for the embeddings and one for each layer."""
    if any(name.startswith(f"{_PROJECTIONS}.") for name in tensors):
        return [f"{_PROJECTIONS}.{layer}" for layer in range(num_layers + 1)]
    return [_PROJECTION]


def _teacher_width(tensors: dict[str, Tensor], projection: str) -> int:
    """How many numbers a projection gives; 0 where there is none, which is then said to be missing."""
    bias = tensors.get(f"{projection}.bias")
    return len(bias) if bias is not None and bias.dim() == 1 else 0


def _compare(name_or_path: str, expected: dict[str, torch.Size], tensors: dict[str, Tensor]) -> None:
    missing = [name for name in expected if name not in tensors]
    if missing:
        raise ArgumentError(
            f"{len(missing)} weights of a General TinyBERT are missing in {name_or_path}: {', '.join(missing)}. Download it again, or give "
            "a checkpoint of general distillation."
        )
    for name, shape in expected.items():
        found = tensors[name].shape
        if found != shape:
            raise ArgumentError(
                f"{name} is {tuple(found)} in the weights of {name_or_path}, and {tuple(shape)} by its config.json. One of the two files "
                "is of another model; download both again."
            )


def _tokenizer(name_or_path: str, vocab_size: int) -> BertTokenizer:
    if _file(name_or_path, "vocab.txt") is None:
        raise ArgumentError(f"There is no vocab.txt in {name_or_path}, so what its ids mean is not known.")
    tokenizer: BertTokenizer = BertTokenizer.from_pretrained(name_or_path)
    if len(tokenizer) != vocab_size:
        raise ArgumentError(
            f"vocab.txt of {name_or_path} has {len(tokenizer)} words, and its config.json says vocab_size is {vocab_size}. Download both "
            "again."
        )
    return tokenizer
