"""Adapters over a model whose layers were dropped.

An adapter file names its base model. If layers of that base were dropped, the adapter loads, silently, onto the full one. So
the dropped base is saved beside the adapters, and the adapters' configs name it:

    output_dir/adapter_config.json      base_model_name_or_path: .../output_dir/base_model
    output_dir/base_model/              the dropped base, without adapters

Until it is saved, the adapters name a base that cannot be loaded, so that nobody loads the full one unawares; so do adapters that are
added to a model after its layers were dropped. `layers.adapter_base` loads adapters and base together again.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from hf_compress.errors import LayerDropError
from hf_compress.layers.rebuild import build_empty
from hf_compress.layers.record import described, kept_layers, recorded_drop
from hf_compress.layers.stack import LayerStack, pretrained_model
from hf_compress.layers.zero import whole_parameters

CONFIG_FILE = "adapter_config.json"
BASE_FOLDER = "base_model"
BASE_NOT_SAVED = "layers-dropped-from-base--call-save_dropped_base"
KEPT_STACKS = dict[str, tuple[LayerStack, tuple[int, ...]]]
LAYER_NUMBER = re.compile(r"(?:^|[.\\(\[|])\d+(?:$|[.\\)\]|,-])")
NAMING_FIELDS = ("target_modules", "exclude_modules", "modules_to_save", "rank_pattern", "alpha_pattern", "target_parameters")


def adapter_configs(model: nn.Module) -> dict[str, Any]:
    """The model's PEFT adapters by name; empty if it has none."""
    configs = getattr(model, "peft_config", None)
    return dict(configs) if isinstance(configs, dict) else {}


def check_adapters(model: nn.Module, kept: KEPT_STACKS) -> None:
    """Raise LayerDropError if an adapter of `model` could not be loaded again once only the layers `kept` are left."""
    for name, config in adapter_configs(model).items():
        if getattr(config, "is_prompt_learning", False):
            raise LayerDropError(
                f"The adapter {name!r} ({config.peft_type}) holds a prompt for each layer of the full model: drop the "
                "layers first, then add the adapter."
            )
        for field in NAMING_FIELDS:
            value = getattr(config, field, None)
            words = [value] if isinstance(value, str) else list(value or ())
            numbered = [word for word in words if LAYER_NUMBER.search(str(word))]
            if numbered:
                raise LayerDropError(
                    f"The adapter {name!r} names layers by number in {field} ({numbered[0]!r}), and dropping layers renumbers them: "
                    "drop the layers first, then add the adapter."
                )
        _renumbered(name, config, kept)


def renumber_adapters(model: nn.Module, kept: KEPT_STACKS) -> None:
    """Let `layers_to_transform` of each adapter follow its layers to their new places. `check_adapters` came before."""
    for name, config in adapter_configs(model).items():
        renumbered = _renumbered(name, config, kept)
        if renumbered is not None:
            config.layers_to_transform = renumbered


def forget_base(model: nn.Module) -> None:
    """Let the adapters, present and to come, name no base that could be loaded: the one they would name still has its dropped layers."""
    pretrained_model(model).name_or_path = BASE_NOT_SAVED  # where PEFT takes it from when an adapter is added
    for config in adapter_configs(model).values():
        config.base_model_name_or_path = BASE_NOT_SAVED


def base_is_forgotten(model: nn.Module) -> bool:
    """Whether the base of the model's adapters was dropped and has not been saved by `save_dropped_base` since."""
    return any(config.base_model_name_or_path == BASE_NOT_SAVED for config in adapter_configs(model).values())


def holds_adapter(folder: str | Path) -> bool:
    """Whether a folder holds an adapter and not a whole model."""
    path = Path(folder)
    return (path / CONFIG_FILE).is_file() and not (path / "config.json").is_file()


def base_of(folder: str | Path) -> str:
    """The folder or name of the base that the adapter in `folder` was trained on.

    That is the one that it names; where it names a `base_model` that is not there any more, the one beside the adapter, or beside the
    checkpoints that it is one of.

    Raises:
        LayerDropError: there is no adapter in `folder`, it names no base, or a base that lost layers and was not saved.
    """
    path = Path(folder)
    if not (path / CONFIG_FILE).is_file():
        raise LayerDropError(f"There is no adapter in {folder}: it has no {CONFIG_FILE}. Give the folder that save_pretrained wrote.")
    named: str | None = json.loads((path / CONFIG_FILE).read_text(encoding="utf-8")).get("base_model_name_or_path")
    if named and Path(named).is_dir():
        return named
    if named in (None, BASE_NOT_SAVED) or Path(named).name == BASE_FOLDER:
        for beside in (path / BASE_FOLDER, path.resolve().parent / BASE_FOLDER):
            if (beside / "config.json").is_file():
                return str(beside)
    if named == BASE_NOT_SAVED:
        raise LayerDropError(
            f"The adapter in {folder} was trained on a model whose layers had been dropped, and that model was not saved with it. Where it "
            "was trained, call hf_compress.layers.peft.save_dropped_base(model, folder) before model.save_pretrained(folder)."
        )
    if not named:
        raise LayerDropError(
            f"The adapter in {folder} names no base (base_model_name_or_path in {CONFIG_FILE}). Hand the base over: "
            "load_with_adapters(folder, base=model)."
        )
    return named


def save_dropped_base(model: nn.Module, directory: str | Path, *, write: bool = True) -> Path:
    """Save the base of a PEFT model, without its adapters, in `directory`/base_model, and let the adapters name it.

    Call it before `model.save_pretrained(directory)`; LayerDropCallback does by itself. Among several processes all call it,
    and one with `write=True`. Returns the folder. Raises LayerDropError if `model` has no adapters or its weights do not fit
    its config, and if the folder holds a base of other layers, which the adapters that were saved beside it need.
    """
    configs = adapter_configs(model)
    if not configs:
        raise LayerDropError(f"{type(model).__name__} has no adapters: save it with save_pretrained.")
    folder = (Path(directory) / BASE_FOLDER).resolve()
    _refuse_to_overwrite(folder, model)
    with whole_parameters(model):
        if write:
            _plain_base(model).save_pretrained(folder)
    pretrained_model(model).name_or_path = str(folder)
    for config in configs.values():
        config.base_model_name_or_path = str(folder)
    return folder


def _refuse_to_overwrite(folder: Path, model: nn.Module) -> None:
    if not (folder / "config.json").is_file():
        return
    there = recorded_drop(json.loads((folder / "config.json").read_text(encoding="utf-8"))) or {}
    present = recorded_drop(pretrained_model(model).config) or {}
    if kept_layers(there) != kept_layers(present):
        raise LayerDropError(
            f"{folder} holds the base of adapters that were trained before, a model that {described(there)}, and this one "
            f"{described(present)}. Choose another output_dir, or delete that folder and its adapters."
        )


def _plain_base(model: nn.Module) -> PreTrainedModel:
    """The base, with the parameters that the adapters wrap and without what they add. It shares memory with `model`."""
    owner = pretrained_model(model)
    base = build_empty(owner, owner.config)
    wanted = base.state_dict()
    plain: dict[str, torch.Tensor] = {}
    for name, tensor in owner.state_dict().items():
        parts = name.split(".")
        known = ".".join(part for part in parts if part not in ("base_layer", "original_module"))
        if "modules_to_save" not in parts and known in wanted and wanted[known].shape == tensor.shape:
            plain[known] = tensor.detach()
    missing = sorted(wanted.keys() - plain.keys())
    if missing:
        raise LayerDropError(
            f"Cannot save the base of {type(model).__name__} without its adapters: found no weights for {', '.join(missing[:3])}."
        )
    base.load_state_dict(plain, assign=True)
    base.tie_weights()
    return base


def _renumbered(name: str, config: Any, kept: KEPT_STACKS) -> list[int] | None:
    """The adapter's `layers_to_transform` after the drop; None if it has none."""
    layers = getattr(config, "layers_to_transform", None)
    if layers is None:
        return None
    if len(kept) > 1 or any(stack.name != "layers" for stack, _ in kept.values()):
        raise LayerDropError(
            f"The adapter {name!r} names its layers by number (layers_to_transform) in a model with two stacks: drop the layers first."
        )
    ((_, stays),) = kept.values()
    indices = [layers] if isinstance(layers, int) else list(layers)
    left = [stays.index(index + 1) for index in indices if index + 1 in stays]
    if not left:
        raise LayerDropError(
            f"The adapter {name!r} lies only in layers that are to be dropped: drop the layers first, then add the adapter."
        )
    return left
