"""A live teacher: a frozen model as a `SignalSource`."""

from __future__ import annotations

import inspect
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import torch
import transformers
from torch import Tensor, nn

from hf_compress.capture import Capture
from hf_compress.errors import TeacherError
from hf_compress.layers.adapter_base import base_class, load_with_adapters
from hf_compress.layers.peft import base_of, holds_adapter
from hf_compress.layers.stack import unwrap
from hf_compress.signals import Signals, SignalSpec
from hf_compress.task import Kind, auto_class_name, kind_of

logger = logging.getLogger(__name__)

# What a student may be for whose teacher is a language model as it came out of pre-training.
_HEADLESS_KINDS: frozenset[Kind] = frozenset({"masked_lm", "causal_lm", "other"})


class LiveTeacher:
    """A model that is asked, never taught: in eval mode, without gradients, and part of no other module.

    Args:
        model: the teacher, with the head it was fine-tuned with.
        label_order: for each of the student's labels, the teacher's index of the same label; None where the orders agree.

    Example:
        >>> teacher = LiveTeacher(model)                                        # doctest: +SKIP
        >>> teacher.signals({"input_ids": ids, "attention_mask": mask}, SignalSpec(logits=True)).logits["logits"]  # doctest: +SKIP
    """

    def __init__(self, model: nn.Module, *, label_order: tuple[int, ...] | None = None) -> None:
        self.model = model.requires_grad_(False).eval()
        self.columns = input_columns(model)
        self._order = None if label_order is None else torch.tensor(label_order)
        self._capture: Capture | None = None

    def to(self, device: torch.device) -> LiveTeacher:
        """Move the model there."""
        # A quantized or spread-out model stays where it was loaded.
        if not getattr(self.model, "is_quantized", False) and getattr(self.model, "hf_device_map", None) is None:
            self.model.to(device)
        self._order = None if self._order is None else self._order.to(device)
        return self

    def put_labels_in_order(self, label_order: tuple[int, ...] | None) -> None:
        """Change the order of the logits' labels; None is the teacher's own."""
        self._order = None if label_order is None else torch.tensor(label_order)

    def close(self) -> None:
        """Take the hooks off the model; the next call of `signals` puts them on again."""
        if self._capture is not None:
            self._capture.remove()

    def signals(self, inputs: Mapping[str, Tensor], spec: SignalSpec) -> Signals:
        """Ask the teacher.

        Args:
            inputs: a batch; columns that the teacher does not know are left out.
            spec: the layers to show; hooks stay on the model until another spec comes, or `close`.
        """
        if self._capture is None or self._capture.spec != spec or not self._capture.attached:
            self._capture = Capture(self.model, spec, only_in_training=False)
        self.model.eval()  # whoever holds the model may have called train()
        with torch.no_grad():
            outputs: Mapping[str, Any] = self.model(**{name: value for name, value in inputs.items() if name in self.columns})
        signals = self._capture.signals(outputs)
        if self._order is not None and "logits" in signals.logits:
            signals.logits["logits"] = signals.logits["logits"].index_select(-1, self._order)
        return signals


def input_columns(model: nn.Module) -> frozenset[str]:
    """The columns of a batch that a model's forward takes, but for labels."""
    parameters = inspect.signature(unwrap(model).forward).parameters.values()
    named = (each.name for each in parameters if each.kind not in (each.VAR_KEYWORD, each.VAR_POSITIONAL))
    return frozenset(named) - {"labels", "label", "label_ids"}


def load_teacher(
    path: str, kind: Kind, *, revision: str | None = None, dtype: str | None = None, needs_logits: bool = True
) -> transformers.PreTrainedModel:
    """Load a teacher with the student's kind of head; without any where no loss reads its predictions and it has none that was trained.

    A language model whose predictions nobody reads is loaded without its head in any case: it would take a good part of each forward. A
    folder with an adapter (PEFT) is loaded with the base that the adapter was trained on, as a model of the kind it was trained as.

    Args:
        path: a folder, or a name on the Hub.
        kind: what the student is for.
        revision: branch, tag or commit.
        dtype: "float32", "bfloat16", "float16", or None for the format it was saved in.
        needs_logits: whether a loss reads its predictions.

    Raises:
        TeacherError: if it cannot be found, or if its head would be newly initialised and is read.
    """
    adapter = holds_adapter(path)
    name = base_class(path).__name__ if adapter else auto_class_name(kind)
    if not needs_logits and kind in _HEADLESS_KINDS and not adapter:
        model, missing = _load("AutoModel", path, revision, dtype)
        missing = _without_pooler(model, missing)
        if missing:
            raise TeacherError(
                f"The teacher {path!r} is not whole: {', '.join(missing[:4])} would be newly initialised, and a teacher that guesses "
                "teaches guessing. Give the folder or the name of a model that was trained."
            )
        return model
    if name is None:
        raise TeacherError(
            "The student's head is of no kind that is known by name, so its teacher cannot be loaded from a path. "
            "Load the teacher yourself and pass the model: DistillTrainer(teacher=model); or compare no predictions "
            "(--distill_recipe tinybert_general)."
        )
    model, missing = _load(name, path, revision, dtype)
    if adapter and needs_logits and kind_of(model) != kind:
        raise TeacherError(
            f"The teacher {path!r} is an adapter for {kind_of(model)}, the student is for {kind}: predictions cannot be compared. "
            "Give an adapter that was trained on the student's task."
        )
    if missing and not needs_logits and not adapter:
        logger.warning(
            "The teacher %s has no trained head: %s would be newly initialised. No loss reads its predictions, so its layers teach "
            "alone; a teacher that was fine-tuned on the task teaches better.",
            path,
            ", ".join(missing[:4]),
        )
        return load_teacher(path, "other", revision=revision, dtype=dtype, needs_logits=False)
    if missing:
        raise TeacherError(
            f"The teacher {path!r} has no trained head: {', '.join(missing[:4])} would be newly initialised, and a "
            "teacher that guesses teaches guessing. Fine-tune it on the task first, and give the folder that this wrote."
        )
    return model


def _load(name: str, path: str, revision: str | None, dtype: str | None) -> tuple[transformers.PreTrainedModel, list[str]]:
    """A model of the class of that name, and the weights that were not there or had another size."""
    options: dict[str, Any] = {"revision": revision} if revision else {}
    try:
        with torch.random.fork_rng(devices=[]):  # what is newly initialised draws, and the student is to begin as in a run from disk
            source = base_of(path) if holds_adapter(path) else path
            model, loading = getattr(transformers, name).from_pretrained(source, dtype=dtype or "auto", output_loading_info=True, **options)
            if holds_adapter(path):
                load_with_adapters(path, base=model)
    except (OSError, ValueError, RuntimeError) as error:
        reason = " ".join(str(error).split())
        looked = "No model could be read from that folder" if Path(path).is_dir() else "It is neither a folder nor a model's name"
        raise TeacherError(f"The teacher {path!r} cannot be loaded. {looked}: {reason[:300]}") from error
    missing = sorted(loading["missing_keys"])
    mismatched = sorted(str(key[0] if isinstance(key, tuple) else key) for key in loading.get("mismatched_keys", ()))
    # What an adapter brought along, such as the classifier that was trained with it, stands in the place of what the base lacks.
    brought = {name.replace(".original_module.", ".") for name in model.state_dict() if ".original_module." in name}
    return cast(transformers.PreTrainedModel, model), [key for key in missing + mismatched if key not in brought]


def _without_pooler(model: transformers.PreTrainedModel, missing: list[str]) -> list[str]:
    """Take off a pooler that was not trained: nobody reads it, and random weights would make it another teacher each time."""
    if getattr(model, "pooler", None) is not None and any(name.startswith("pooler.") for name in missing):
        model.pooler = None  # type: ignore[assignment]
    return [name for name in missing if not name.startswith("pooler.")]
