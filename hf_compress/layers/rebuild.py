"""Would the dropped model come back from its saved config as it is? Asked before anything is changed.

The model class is built twice without memory (device "meta"): from the config as it is, and from the config as it would be
saved. Taking the dropped layers out of the first has to give the second: the same parameter names and shapes, and the same
plain attributes in each layer. That finds what hangs on a layer's place:

    T5           layer 1 alone holds the relative position bias
    ModernBERT   layer 1 alone has no attention norm
    GPT-2        scale_attn_by_inverse_layer_idx divides by the layer's number
"""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from hf_compress.errors import LayerDropError
from hf_compress.layers.stack import LayerStack, is_index_name
from hf_compress.layers.strategies import describe_layers

Scalar = bool | int | float | str | None


@dataclass(frozen=True)
class ConfigEdit:
    """New values for one config object: the depth under each of its names, and lists that have one entry a layer."""

    config: PreTrainedConfig
    values: dict[str, Any]

    def apply(self) -> None:
        """Write the values. Depth and lists change together: a config checks one against the other when it is saved."""
        for name, value in self.values.items():
            setattr(self.config, name, value)


def config_edits(stack: LayerStack, kept: Sequence[int]) -> list[ConfigEdit]:
    """What has to change in the configs when only the layers `kept`, counted from 1, stay in `stack`."""
    edits = []
    for config, names in stack.configs:
        values: dict[str, Any] = dict.fromkeys(names, len(kept))
        for name, value in vars(config).items():
            other = {"encoder": "decoder", "decoder": "encoder"}.get(stack.side() or "", "\0")
            if "layer" in name and other not in name and isinstance(value, (list, tuple)) and len(value) == stack.depth:
                values[name] = type(value)(value[layer - 1] for layer in kept)
        edits.append(ConfigEdit(config, values))
    return edits


def check_rebuild(owner: PreTrainedModel, kept: dict[str, tuple[LayerStack, tuple[int, ...]]]) -> None:
    """Raise LayerDropError unless a model with only these layers could be saved and loaded again to the same outputs.

    `kept` has the layers that stay in each stack that is touched. Neither model nor config is changed.
    """
    for stack, layers in kept.values():
        _check_neighbours(owner, stack, layers)
    edits = [edit for stack, layers in kept.values() for edit in config_edits(stack, layers)]
    try:
        before = build_empty(owner, owner.config)
        after = build_empty(owner, _edited(owner.config, edits))
    except Exception as error:
        raise LayerDropError(
            f"Layers cannot be dropped from this {type(owner).__name__}: it cannot be built from a config with fewer layers, so that it "
            f"could not be loaded once it is saved ({type(error).__name__}: {error})."
        ) from error
    wanted: dict[str, torch.Size] = {}
    for name, tensor in before.state_dict().items():
        renamed = _renamed(name, kept)
        if renamed is not None:
            wanted[renamed] = tensor.shape
    found = {name: tensor.shape for name, tensor in after.state_dict().items()}
    different = sorted(name for name in wanted.keys() | found.keys() if wanted.get(name) != found.get(name))
    if different:
        raise LayerDropError(_explain(owner, kept, different, wanted, found))
    for stack, layers in kept.values():
        if not stack.shared:
            _check_attributes(owner, stack, layers, before, after)


def build_empty(owner: PreTrainedModel, config: PreTrainedConfig) -> PreTrainedModel:
    """A model of the owner's class on the meta device, as from_pretrained would build it from the saved `config`."""
    saved = json.loads(config.to_json_string())
    saved.pop("quantization_config", None)
    rebuilt = type(config).from_dict(saved)
    build: Any = type(owner)
    with torch.random.fork_rng(devices=[]), torch.device("meta"):
        model: PreTrainedModel = build(rebuilt)
    return model


def first_layer_must_stay(owner: PreTrainedModel, stack: LayerStack) -> bool:
    """Whether layer 1 holds something that no other layer could take over."""
    try:
        check_rebuild(owner, {stack.name: (stack, tuple(range(2, stack.depth + 1)))})
    except LayerDropError:
        return True
    return False


def _check_neighbours(owner: PreTrainedModel, stack: LayerStack, layers: tuple[int, ...]) -> None:
    if 1 not in layers and isinstance(getattr(stack.parent, "conv", None), nn.Module):
        raise LayerDropError(
            f"Layer 1 of {type(owner).__name__} has to stay: the model's convolution (config.conv_kernel_size) works on its output. "
            "Choose other layers, for example strategy='top' or 'symmetric'."
        )
    if stack.shared:
        moved = [old for new, old in enumerate(layers, start=1) if stack.group(new, len(layers)) != stack.group(old)]
        if moved:
            raise LayerDropError(
                f"{type(owner).__name__} shares its layers in {len(stack.container)} groups, each called for an equal part of the depth; "
                f"with {describe_layers(layers)} of {stack.depth} kept, layer {moved[0]} would be computed by another group. "
                "Drop equally many layers of each group."
            )


def _edited(config: PreTrainedConfig, edits: list[ConfigEdit]) -> PreTrainedConfig:
    """A copy of `config` with those edits that are to it or to a config inside it; others are private to a module."""
    copies: dict[int, Any] = {}
    edited = copy.deepcopy(config, copies)
    for edit in edits:
        copied = copies.get(id(edit.config))
        if copied is not None:
            ConfigEdit(copied, edit.values).apply()
    return edited


def _renamed(name: str, kept: dict[str, tuple[LayerStack, tuple[int, ...]]]) -> str | None:
    """The parameter's name once the layers are dropped; None if it goes with them."""
    for stack, layers in kept.values():
        if name.startswith(f"{stack.path}.") and not stack.shared:
            index, _, rest = name[len(stack.path) + 1 :].partition(".")
            if int(index) + 1 not in layers:
                return None
            return f"{stack.path}.{layers.index(int(index) + 1)}.{rest}"
    return name


def _explain(
    owner: PreTrainedModel,
    kept: dict[str, tuple[LayerStack, tuple[int, ...]]],
    different: list[str],
    wanted: dict[str, torch.Size],
    found: dict[str, torch.Size],
) -> str:
    model = type(owner).__name__
    for stack, layers in kept.values():
        for name in different:
            if not name.startswith(f"{stack.path}."):
                continue
            index, _, part = name[len(stack.path) + 1 :].partition(".")
            new = int(index) + 1
            old = layers[new - 1] if new <= len(layers) else new
            where = f"layer {old}" + (f" of the {stack.name}" if stack.name != "layers" else "")
            if name not in wanted:
                why = f"a saved model is rebuilt with {part!r} in its layer {new}, and {where} has none"
            elif name not in found:
                why = f"{where} has {part!r}, and a saved model is rebuilt without it in its layer {new}"
            else:
                why = (
                    f"{part!r} of {where} has shape {tuple(wanted[name])}, and a saved model is rebuilt with "
                    f"{tuple(found[name])} in its layer {new}"
                )
            stays = "Layer 1 has to stay" if new == 1 and old != 1 else "These layers cannot be dropped"
            return f"{stays} in {model}: {why}. Choose other layers, for example strategy='top' or 'symmetric'."
    return (
        f"These layers cannot be dropped from {model}: a saved model would be rebuilt with other parameters ({', '.join(different[:3])})."
    )


def _check_attributes(owner: PreTrainedModel, stack: LayerStack, layers: tuple[int, ...], before: nn.Module, after: nn.Module) -> None:
    for new, old in enumerate(layers, start=1):
        wanted = dict(_attributes(before.get_submodule(f"{stack.path}.{old - 1}")))
        found = dict(_attributes(after.get_submodule(f"{stack.path}.{new - 1}")))
        for name in sorted(wanted.keys() | found.keys()):
            if wanted.get(name) != found.get(name):
                raise LayerDropError(
                    f"These layers cannot be dropped from {type(owner).__name__}: layer {old} would become layer "
                    f"{new}, and a saved model is "
                    f"rebuilt with {name} = {found.get(name)!r} there instead of {wanted.get(name)!r}. Choose layers "
                    "that keep their place, "
                    "for example strategy='top'."
                )


def _attributes(layer: nn.Module) -> Iterator[tuple[str, Scalar]]:
    """The plain attributes of a layer's modules that its computation may use; not its place, and no drop rate of training."""
    for path, module in layer.named_modules():
        for name, value in vars(module).items():
            if isinstance(value, (bool, int, float, str)) and not name.startswith("_") and not is_index_name(name) and "drop" not in name:
                yield f"{path}.{name}".lstrip("."), value
