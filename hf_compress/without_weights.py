"""A model's structure from its config alone: its parameters have shapes and no numbers, and nothing large is read."""

from __future__ import annotations

from typing import Any

import torch
import transformers
from transformers import PreTrainedModel

from hf_compress.errors import TeacherError
from hf_compress.students.architecture import architecture_named


def read_config(path: str) -> Any:
    """A model's config.

    Args:
        path: a folder, or a name on the hub.

    Raises:
        TeacherError: there is no model.
    """
    try:
        return transformers.AutoConfig.from_pretrained(path)
    except (OSError, ValueError) as error:
        raise TeacherError(f"There is no model in {path}: {str(error).strip().splitlines()[0]}") from error


def model_without_weights(path: str) -> PreTrainedModel:
    """The model that its config names, on the meta device.

    Args:
        path: a folder, or a name on the hub.

    Raises:
        TeacherError: there is no model, or transformers does not know it.
    """
    config = read_config(path)
    found = architecture_named(config)
    if found is None:
        names = list(getattr(config, "architectures", None) or [])
        raise TeacherError(f"The config of {path} names {names[0] if names else 'no architecture'}, which is no model of transformers.")
    with torch.device("meta"):
        return found(config)
