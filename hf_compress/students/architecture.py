"""A model's class by the name that its config states: one of transformers, or one of this package's."""

from __future__ import annotations

from typing import Any

import transformers
from transformers import PreTrainedModel

from hf_compress.students import pruned_models


def architecture_named(config: Any) -> type[PreTrainedModel] | None:
    """The first of a config's `architectures`; None if it names none, or one that is no model that is known here."""
    names = list(getattr(config, "architectures", None) or [])
    found = (getattr(transformers, names[0], None) or getattr(pruned_models, names[0], None)) if names else None
    return found if isinstance(found, type) and issubclass(found, PreTrainedModel) else None
