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
from hf_compress.layers.adapter_base import base_class, load_with_adapters
from hf_compress.layers.peft import base_of, holds_adapter
from hf_compress.layers.stack import unwrap
from hf_compress.layers.zero import is_split, loaded_whole
from hf_compress.prediction_head import HeadTap, PredictionHead
from hf_compress.signals import HeadStates, Signals, SignalSpec
from hf_compress.task import Kind, auto_class_name, kind_of, kind_of_classes

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
        self._head: PredictionHead | None = None
        self._tap: HeadTap | None = None
        self._read_by_head: Tensor | None = None
        self._chooses = kind_of(model) == "multiple_choice"
        self._has_words = kind_of(model) in ("causal_lm", "masked_lm")

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
        self._hook_head(SignalSpec(logits=True))

    def signals(self, inputs: Mapping[str, Tensor], spec: SignalSpec) -> Signals:
        """Ask the teacher.

        Args:
            inputs: a batch; columns that the teacher does not know are left out. A teacher of multiple choice may be given texts,
                (batch, tokens): each is the only choice; and one of texts choices, (batch, choices, tokens): each is a text.
            spec: the layers to show; hooks stay on the model until another spec comes, or `close`.

        Raises:
            LossError: `head_states` are asked for, and the model's head cannot be called by itself.
        """
        if self._capture is None or self._capture.spec != spec or not self._capture.attached:
            self._capture = Capture(self.model, spec, only_in_training=False)
        self._hook_head(spec)
        self.model.eval()  # whoever holds the model may have called train()
        # Pixels and other numbers come in the student's type: under DeepSpeed the Trainer casts each batch to that of its engine.
        own = next((each.dtype for each in self.model.parameters() if each.is_floating_point()), torch.float32)
        known = {name: _in_type(value, own) for name, value in inputs.items() if name in self.columns}
        ids = known.get("input_ids")
        if ids is not None and ids.dim() == (2 if self._chooses else 3):
            size = (len(ids), 1, -1) if self._chooses else (-1, ids.shape[-1])
            known = {name: value.reshape(size) if value.shape == ids.shape else value for name, value in known.items()}
        with torch.no_grad():
            outputs: Mapping[str, Any] = self.model(**known)
        signals = self._capture.signals(outputs)
        if spec.head_states:
            assert self._read_by_head is not None and self._head is not None
            signals.head_states = HeadStates(self._read_by_head, torch.no_grad()(self._head.logits), self._head.sharded)
            self._read_by_head = None
        if self._order is not None and "logits" in signals.logits:
            signals.logits["logits"] = signals.logits["logits"].index_select(-1, self._order)
        return signals

    def _hook_head(self, spec: SignalSpec) -> None:
        """Let a language model's head be called for what is asked alone: hardly at all, if nobody reads predictions."""
        wanted = spec.head_states or (self._has_words and not spec.logits)
        if self._tap is not None and not (wanted and self._tap.attached and self._tap.takes == spec.head_states):
            self._tap.remove()
            self._tap = None
        if wanted and self._tap is None and spec.head_states:
            self._head = self._head or PredictionHead(self.model)
            self._tap = HeadTap(self.model, self._head, self._take, skip=True, only_in_training=False)
        elif wanted and self._tap is None:
            self._tap = HeadTap.of_unread(self.model, only_in_training=False)
            self._has_words = self._tap is not None

    def _take(self, hidden: Tensor) -> None:
        self._read_by_head = hidden


def input_columns(model: nn.Module) -> frozenset[str]:
    """The columns of a batch that a model's forward takes, but for labels."""
    parameters = inspect.signature(unwrap(model).forward).parameters.values()
    named = (each.name for each in parameters if each.kind not in (each.VAR_KEYWORD, each.VAR_POSITIONAL))
    return frozenset(named) - {"labels", "label", "label_ids"}


def _in_type(value: Any, dtype: torch.dtype) -> Any:
    return value.to(dtype) if isinstance(value, Tensor) and value.is_floating_point() else value


def load_teacher(
    path: str, kind: Kind, *, revision: str | None = None, dtype: str | None = None, needs_logits: bool = True, sharded: bool = False
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
        sharded: under a config of ZeRO-3, only a part of it on each process, where the model is whole otherwise.

    Raises:
        TeacherError: if it cannot be found, or if its head is read, and would be newly initialised or was trained for another kind of task.
    """
    adapter = holds_adapter(path)
    name = base_class(path).__name__ if adapter else auto_class_name(kind)
    if not needs_logits and kind in _HEADLESS_KINDS and not adapter:
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
    other = None if adapter else _other_head(path, kind, revision)
    try:
        model, missing = _load(name, path, revision, dtype, sharded)
    except TeacherError as error:
        if other is None:
            raise
        if needs_logits:
            raise TeacherError(other) from error
        logger.warning("%s Its layers teach alone.", other)
        return load_teacher(path, "other", revision=revision, dtype=dtype, needs_logits=False, sharded=sharded)
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
        return load_teacher(path, "other", revision=revision, dtype=dtype, needs_logits=False, sharded=sharded)
    if missing:
        raise TeacherError(
            f"The teacher {path!r} has no trained head: {', '.join(missing[:4])} would be newly initialised, and a "
            "teacher that guesses teaches guessing. Fine-tune it on the task first, and give the folder that this wrote."
        )
    if other is not None and needs_logits:  # heads of two kinds may have weights of the same names and sizes
        raise TeacherError(other)
    return model


def _other_head(path: str, kind: Kind, revision: str | None) -> str | None:
    """What to say of a model that was saved with a head for another kind of task; None where it was not, or does not say."""
    try:
        config = transformers.AutoConfig.from_pretrained(path, **({"revision": revision} if revision else {}))
    except (OSError, ValueError):
        return None  # who loads it will say so
    classes = tuple(config.architectures or ())
    found = kind_of_classes(classes)
    if found in ("other", kind):
        return None
    own, asked = (name.replace("_", " ") for name in (found, kind))
    return (
        f"The teacher {path!r} is a {classes[0]}: its head is for {own}, and the student's for {asked}, so their predictions mean "
        "different things. Take a teacher that was fine-tuned on the student's task, or compare no logits (--distill_weights logits=0)."
    )


def _load(name: str, path: str, revision: str | None, dtype: str | None, sharded: bool) -> tuple[transformers.PreTrainedModel, list[str]]:
    """A model of the class of that name, and the weights that were not there or had another size."""
    options: dict[str, Any] = {"revision": revision} if revision else {}
    try:
        # What is newly initialised draws, and the student is to begin as in a run from disk.
        with torch.random.fork_rng(devices=[]), nullcontext() if sharded else loaded_whole():
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
