"""The learnt projections beside a model on disk: a run writes them there, and a later one starts from them.

The file's metadata says between which models they were learnt, as far as that is known: "models" is JSON, with "student" and "teacher"
(their `model_type`), "student_hidden_size" and "teacher_hidden_size".
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from hf_compress.errors import ArgumentError

FILE_NAME = "distill_projections.safetensors"


def shared_projection(stack: str) -> str:
    """The name of the one projection that all layers of a stack share."""
    return f"{stack}_shared"


def layer_projection(stack: str, layer: int) -> str:
    """The name of the projection of one layer of a stack, counted from 1; 0 is the embedding output."""
    return f"{stack}_layer_{layer}"


def write_projections(folder: str | Path, tensors: Mapping[str, Tensor], models: Mapping[str, str]) -> None:
    """Write `NAME.weight`, (teacher's width, student's width), and `NAME.bias`, (teacher's width,), of each projection.

    Args:
        folder: the student's.
        tensors: by name.
        models: between which they were learnt; see above.
    """
    whole = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    # One entry: safetensors writes several in another order each time, and equal maps are to be equal files.
    save_file(whole, Path(folder) / FILE_NAME, metadata={"models": json.dumps(models, sort_keys=True)})


def read_projections(folder: str | Path) -> dict[str, Tensor]:
    """What `write_projections` wrote; empty where the folder has no such file.

    Raises:
        ArgumentError: the file is damaged.
    """
    path = Path(folder) / FILE_NAME
    if not path.is_file():
        return {}
    try:
        return load_file(path)
    except SafetensorError as error:
        raise ArgumentError(
            f"The projections in {path} cannot be read ({error}). Delete that file, and they start anew; or train that student again."
        ) from error


def read_models(folder: str | Path) -> dict[str, str]:
    """Between which models the projections in a folder were learnt; empty where there are none, and where the file does not say."""
    path = Path(folder) / FILE_NAME
    if not path.is_file():
        return {}
    with safe_open(path, framework="pt") as file:
        return dict(json.loads((file.metadata() or {}).get("models", "{}")))
