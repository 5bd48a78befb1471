"""A live teacher: a frozen model as a `SignalSource`."""

from __future__ import annotations

import inspect
import logging
from collections.abc import Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any, cast

import torch
import transformers
from torch import Tensor, nn

from hf_compress.capture import Capture
from hf_compress.errors import TeacherError
from hf_compress.layers.stack import unwrap
from hf_compress.layers.zero import is_split, loaded_whole
from hf_compress.signals import Signals, SignalSpec
from hf_compress.task import Kind, auto_class_name

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
        parameters = inspect.signature(unwrap(model).forward).parameters.values()
        named = (each.name for each in parameters if each.kind not in (each.VAR_KEYWORD, each.VAR_POSITIONAL))
        self.columns = frozenset(named) - {"labels", "label", "label_ids"}
        self._order = None if label_order is None else torch.tensor(label_order)
        self._capture: Capture | None = None

    def to(self, device: torch.device) -> LiveTeacher:
        """Move the model there."""
        # A quantized, spread-out or split model stays where it was loaded.
        stays = getattr(self.model, "is_quantized", False) or getattr(self.model, "hf_device_map", None) is not None
        if not stays and not is_split(self.model):
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
        # Pixels and other numbers come in the student's type: under DeepSpeed the Trainer casts each batch to that of its engine.
        own = next((each.dtype for each in self.model.parameters() if each.is_floating_point()), torch.float32)
        asked = {name: value for name, value in inputs.items() if name in self.columns}
        with torch.no_grad():
            outputs: Mapping[str, Any] = self.model(**{name: _in_type(value, own) for name, value in asked.items()})
        signals = self._capture.signals(outputs)
        if self._order is not None and "logits" in signals.logits:
            signals.logits["logits"] = signals.logits["logits"].index_select(-1, self._order)
        return signals


def _in_type(value: Any, dtype: torch.dtype) -> Any:
    return value.to(dtype) if isinstance(value, Tensor) and value.is_floating_point() else value


def load_teacher(
    path: str, kind: Kind, *, revision: str | None = None, dtype: str | None = None, needs_logits: bool = True, sharded: bool = False
) -> transformers.PreTrainedModel:
    """Load a teacher with the student's kind of head; without any where no loss reads its predictions and it has none that was trained.

    A language model whose predictions nobody reads is loaded without its head in any case: it would take a good part of each forward.

    Args:
        path: a folder, or a name on the Hub.
        kind: what the student is for.
        revision: branch, tag or commit.
        dtype: "float32", "bfloat16", "float16", or None for the format it was saved in.
        needs_logits: whether a loss reads its predictions.
        sharded: under a config of ZeRO-3, only a part of it on each process, where the model is whole otherwise.

    Raises:
        TeacherError: if it cannot be found, or if its head would be newly initialised and is read.
    """
    name = auto_class_name(kind)
    if not needs_logits and kind in _HEADLESS_KINDS:
        model, missing = _load("AutoModel", path, revision, dtype, sharded)
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
    model, missing = _load(name, path, revision, dtype, sharded)
    if missing and not needs_logits:
        logger.warning(
            "The teacher %s has no trained head: %s would be newly initialised. No loss reads its predictions, so its layers teach "
            "alone; a teacher that was fine-tuned on the task teaches better.",
            path,
            ", ".join(missing[:4]),
        )
        return load_teacher(path, "other", revision=revision, dtype=dtype, needs_logits=False, sharded=sharded)
    if missing:
        raise TeacherError(
            f"The teacher {path!r} has no trained head: {', '.join(missing[:4])} would be newly initialised, and a "
            "teacher that guesses teaches guessing. Fine-tune it on the task first, and give the folder that this wrote."
        )
    return model


def _load(name: str, path: str, revision: str | None, dtype: str | None, sharded: bool) -> tuple[transformers.PreTrainedModel, list[str]]:
    """A model of the class of that name, and the weights that were not there or had another size."""
    options: dict[str, Any] = {"revision": revision} if revision else {}
    try:
        # What is newly initialised draws, and the student is to begin as in a run from disk.
        with torch.random.fork_rng(devices=[]), nullcontext() if sharded else loaded_whole():
            model, loading = getattr(transformers, name).from_pretrained(path, dtype=dtype or "auto", output_loading_info=True, **options)
    except (OSError, ValueError, RuntimeError) as error:
        reason = " ".join(str(error).split())
        looked = "No model could be read from that folder" if Path(path).is_dir() else "It is neither a folder nor a model's name"
        raise TeacherError(f"The teacher {path!r} cannot be loaded. {looked}: {reason[:300]}") from error
    missing = sorted(loading["missing_keys"])
    mismatched = sorted(str(key[0] if isinstance(key, tuple) else key) for key in loading.get("mismatched_keys", ()))
    return cast(transformers.PreTrainedModel, model), missing + mismatched


def _without_pooler(model: transformers.PreTrainedModel, missing: list[str]) -> list[str]:
    """Take off a pooler that was not trained: nobody reads it, and random weights would make it another teacher each time."""
    if getattr(model, "pooler", None) is not None and any(name.startswith("pooler.") for name in missing):
        model.pooler = None  # type: ignore[assignment]
    return [name for name in missing if not name.startswith("pooler.")]
