"""Adapters and the base that they were trained on, together again.

    output_dir/adapter_config.json      base_model_name_or_path: /where/it/was/output_dir/base_model
    output_dir/base_model/              a base whose layers were dropped, if they were
    output_dir/checkpoint-500/          adapters on the same base

PEFT puts an adapter on any base whose modules have the names it looks for: four layers' worth of it on a model of six, with a warning;
on four others, without. `load_with_adapters` finds the base that belongs to it, also where the folder was moved, and refuses another.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import transformers
from safetensors import safe_open
from torch import nn
from transformers import PreTrainedModel

from hf_compress.errors import LayerDropError
from hf_compress.layers.peft import CONFIG_FILE, LAYER_NUMBER, base_of
from hf_compress.layers.record import described, kept_layers, recorded_drop
from hf_compress.layers.stack import find_stacks, pretrained_model

WEIGHTS_FILE = "adapter_model.safetensors"
_OWN_BASE = "Load it with its own base: hf_compress.load_with_adapters({!r})."
# What an adapter is for, in PEFT's words, and the class that loads its base.
_TASK_CLASSES = {
    "SEQ_CLS": "AutoModelForSequenceClassification",
    "SEQ_2_SEQ_LM": "AutoModelForSeq2SeqLM",
    "CAUSAL_LM": "AutoModelForCausalLM",
    "TOKEN_CLS": "AutoModelForTokenClassification",
    "QUESTION_ANS": "AutoModelForQuestionAnswering",
    "FEATURE_EXTRACTION": "AutoModel",
}


def base_class(folder: str | Path) -> Any:
    """The class that loads the base: by what the adapter is for, else the class that it was trained on, else what its config says."""
    settings = json.loads((Path(folder) / CONFIG_FILE).read_text(encoding="utf-8"))
    if settings.get("task_type") in _TASK_CLASSES:
        return getattr(transformers, _TASK_CLASSES[settings["task_type"]])
    trained_on = (settings.get("auto_mapping") or {}).get("base_model_class")
    names = [trained_on] if trained_on else (transformers.AutoConfig.from_pretrained(base_of(folder)).architectures or [])
    return next((getattr(transformers, name) for name in names if hasattr(transformers, name)), transformers.AutoModel)


def refuse_other_base(base: nn.Module, folder: str | Path) -> None:
    """See that the adapter in `folder` belongs on `base`: the same layers were dropped, and each part that it adapts is there.

    Weights are not compared: another model of the same layers, such as one that was trained on, passes.

    Raises:
        LayerDropError: saying what the adapter was trained on, and what `base` is.
    """
    owner = pretrained_model(base)
    path = Path(folder)
    try:
        named = Path(base_of(folder)) / "config.json"
    except LayerDropError:
        named = path / "no base is known"
    present = recorded_drop(owner.config) or {}
    if named.is_file():
        trained_on = recorded_drop(json.loads(named.read_text(encoding="utf-8"))) or {}
        if kept_layers(trained_on) != kept_layers(present):
            raise LayerDropError(
                f"The adapter in {folder} was trained on a model that {described(trained_on)} ({named.parent}), and this "
                f"{type(owner).__name__} {described(present)}: it would adapt other layers than those it was trained for. "
                f"{_OWN_BASE.format(str(folder))}"
            )
    if (path / WEIGHTS_FILE).is_file():
        with safe_open(path / WEIGHTS_FILE, framework="pt") as file:
            names = list(file.keys())
        _refuse_other_depth(owner, folder, names)


def load_with_adapters(folder: str | Path, *, base: PreTrainedModel | None = None, is_trainable: bool = False, **options: Any) -> Any:
    """Load an adapter and the base that it was trained on.

    Args:
        folder: where the adapter lies.
        base: a base that is loaded already, or quantised; by default it is loaded from where `base_of` finds it.
        is_trainable: whether the adapter is to be trained on.
        options: for the base's `from_pretrained`, such as `dtype` or `device_map`.

    Returns:
        A `peft.PeftModel`, in evaluation mode unless it is trainable.

    Raises:
        LayerDropError: there is no adapter, its base cannot be found, or `base` is another.

    Example:
        >>> model = load_with_adapters("out/healed").merge_and_unload()  # doctest: +SKIP
        >>> model.save_pretrained("out/merged")  # a plain model of fewer layers  # doctest: +SKIP
    """
    try:
        import peft
    except ImportError as error:
        raise LayerDropError(f"The adapter in {folder} is loaded with PEFT, which is not installed: pip install 'peft>=0.18'.") from error
    if base is None:
        named = base_of(folder)
        base = base_class(folder).from_pretrained(named, **options)
    elif options:
        raise LayerDropError(f"{', '.join(options)} would have no effect: the base is loaded already. Leave it out, or leave base= out.")
    refuse_other_base(base, folder)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Found missing adapter keys")  # it is an error here
        model = peft.PeftModel.from_pretrained(base, str(folder), is_trainable=is_trainable)
    stored = peft.load_peft_weights(str(folder), device="cpu")
    missing = sorted(peft.get_peft_model_state_dict(model, save_embedding_layers=False).keys() - stored.keys())
    if missing:
        model.unload()
        raise LayerDropError(
            f"The adapter in {folder} has no weights for {len(missing)} parts of this {type(pretrained_model(base)).__name__} that "
            f"it would adapt, such as {missing[0]}: it was trained on another model. {_OWN_BASE.format(str(folder))}"
        )
    return model if is_trainable else model.eval()


def _refuse_other_depth(owner: PreTrainedModel, folder: str | Path, names: Iterable[str]) -> None:
    """The adapter's weights must lie in layers that the model has, and in all of them unless it chose some."""
    inside = [name.removeprefix("base_model.model.") for name in names if LAYER_NUMBER.search(name)]
    stacks = [stack for stack in find_stacks(owner).values() if not stack.shared]
    found = {
        stack.name: {int(name[len(stack.path) + 1 :].partition(".")[0]) + 1 for name in inside if name.startswith(f"{stack.path}.")}
        for stack in stacks
    }
    if inside and stacks and not any(found.values()):
        raise LayerDropError(
            f"The adapter in {folder} adapts {inside[0].partition('.lora_')[0]}, and {type(owner).__name__} has no such part: it was "
            "trained on another architecture, or on a model with another head."
        )
    for stack in stacks:
        if found[stack.name] and max(found[stack.name]) > stack.depth:
            raise LayerDropError(
                f"The adapter in {folder} was trained on {max(found[stack.name])} layers or more, and this {type(owner).__name__} has "
                f"{stack.depth}. {_OWN_BASE.format(str(folder))}"
            )
