"""Where a model keeps its layers, found by structure, not by a list of architectures.

A stack is a ModuleList whose length is the depth that the model's config states, under one of the names in `DEPTH_NAMES`:

    BertForMaskedLM -> bert.encoder.layer                 config.num_hidden_layers     {"layers": ...}
    T5Model         -> encoder.block, decoder.block       config.num_layers, ...       {"encoder": ..., "decoder": ...}
    AlbertModel     -> albert_layer_groups, shared        config.num_hidden_layers     {"layers": ...}, depth in the config only

An index into a ModuleList never leaves this file: outside, layers are counted from 1.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Literal

from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from hf_compress.errors import LayerDropError

DEPTH_NAMES = (
    "num_hidden_layers",
    "n_layer",
    "n_layers",
    "num_layers",
    "encoder_layers",
    "decoder_layers",
    "num_encoder_layers",
    "num_decoder_layers",
)
SHARED_GROUPS_NAME = "num_hidden_groups"


@dataclass(frozen=True, eq=False)
class LayerStack:
    """The layers of a model, or of its encoder or decoder.

    modules: in call order, one a layer; for shared layers (ALBERT) one a group, called several times in a forward.
    time_major: the layers' hidden states are (time, batch, width), as in XLNet, and not (batch, time, width).
    causal: a position sees only those before it, so that the last token is the one that has seen all.
    path, container, parent: where the layers hang; configs: the config objects that state the depth, each with the names
    under which it does.
    """

    name: str
    depth: int
    modules: tuple[nn.Module, ...]
    shared: bool
    time_major: bool
    causal: bool
    path: str = field(repr=False)
    container: nn.ModuleList = field(repr=False)
    parent: nn.Module = field(repr=False)
    configs: tuple[tuple[PreTrainedConfig, tuple[str, ...]], ...] = field(repr=False)

    def module(self, layer: int) -> nn.Module:
        """The module that computes `layer`, counted from 1."""
        return self.modules[self.group(layer) if self.shared else layer - 1]

    def group(self, layer: int, depth: int | None = None) -> int:
        """For shared layers: which group computes `layer`, at the stack's depth or another; groups are counted from 0."""
        return int((layer - 1) / ((self.depth if depth is None else depth) / len(self.container)))

    @property
    def summary_token(self) -> Literal["first", "last"]:
        """Which real token sums the sequence up: the last in XLNet and in decoders, else the first ([CLS])."""
        return "last" if self.causal or self.time_major else "first"

    def side(self) -> str | None:
        """ "encoder" or "decoder" if the path says so, else None."""
        return _side(self.path)

    def remove(self, layers: tuple[int, ...]) -> None:
        """Take `layers`, counted from 1, out of the model and renumber the attributes that repeat a layer's place.

        Depths in configs are not touched. Shared layers stay: there the depth alone counts.
        """
        if self.shared:
            return
        for layer in sorted(layers, reverse=True):
            del self.container[layer - 1]
        kept = [index for index in range(self.depth) if index + 1 not in layers]
        for new, old in enumerate(kept):
            for module in self.container[new].modules():
                for name, value in tuple(vars(module).items()):
                    if is_index_name(name) and type(value) is int and value == old:
                        setattr(module, name, new)
        for name, value in tuple(vars(self.parent).items()):
            if name in DEPTH_NAMES and type(value) is int and value == self.depth:
                setattr(self.parent, name, len(kept))


def is_index_name(name: str) -> bool:
    """Whether an attribute of this name holds a layer's place in its stack, such as `layer_idx`."""
    return name in ("layer_idx", "layer_id", "layer_index", "layer_number", "block_idx")


def unwrap(model: nn.Module) -> nn.Module:
    """The model inside PEFT, DataParallel, DistributedDataParallel or torch.compile wrappers."""
    get_base_model: Any = getattr(model, "get_base_model", None)
    if hasattr(model, "peft_config") and callable(get_base_model):
        base = get_base_model()
        return unwrap(base) if isinstance(base, nn.Module) and base is not model else model
    for name in ("_orig_mod", "module"):
        inner = getattr(model, name, None)
        if isinstance(inner, nn.Module) and not isinstance(model, PreTrainedModel):
            return unwrap(inner)
    return model


def pretrained_model(model: nn.Module) -> PreTrainedModel:
    """The transformers model: the model itself, or the first one inside it.

    Raises LayerDropError if there is none.
    """
    for module in unwrap(model).modules():
        if isinstance(module, PreTrainedModel):
            return module
    raise LayerDropError(
        f"{type(model).__name__} holds no transformers model (PreTrainedModel), so nothing says how deep it is. Give "
        "a model of transformers."
    )


def find_stacks(model: nn.Module) -> dict[str, LayerStack]:
    """The model's stacks of layers by name: "layers" if there is one, else "encoder" and "decoder" or what sets their paths apart.

    The model may be wrapped by PEFT. Raises LayerDropError if no stack can be found, or if the parts of a layer lie in parallel lists.
    """
    owner = pretrained_model(model)
    found: list[tuple[str, nn.ModuleList]] = []
    for path, module in owner.named_modules():
        inside = any(path.startswith(f"{other}.") for other, _ in found)
        if isinstance(module, nn.ModuleList) and not inside and _depth(owner, path, module) is not None:
            found.append((path, module))
    if not found:
        raise LayerDropError(
            f"Found no layers in {type(owner).__name__}: no list of modules is as long as its config says the model is deep "
            f"({', '.join(DEPTH_NAMES)} were looked for)."
        )
    parents = [path.rpartition(".")[0] for path, _ in found]
    if len(set(parents)) < len(parents):
        raise LayerDropError(
            f"{type(owner).__name__} keeps the parts of a layer in parallel lists ({', '.join(path for path, _ in found)}); "
            "layers of such a model cannot be dropped."
        )
    names = _names([path for path, _ in found])
    return {name: _stack(owner, name, path, container) for name, (path, container) in zip(names, found, strict=True)}


def _stack(owner: PreTrainedModel, name: str, path: str, container: nn.ModuleList) -> LayerStack:
    depth = _depth(owner, path, container)
    assert depth is not None
    modules = tuple(container)
    parameters = set(inspect.signature(modules[0].forward).parameters)
    return LayerStack(
        name=name,
        depth=depth,
        modules=modules,
        shared=_shared(owner, path, container),
        time_major={"output_h", "output_g"} <= parameters,
        causal=any(getattr(module, "is_causal", False) is True for module in container.modules()),
        path=path,
        container=container,
        parent=owner.get_submodule(path.rpartition(".")[0]),
        configs=tuple(_depth_configs(owner, path, depth)),
    )


def _depth(owner: PreTrainedModel, path: str, container: nn.ModuleList) -> int | None:
    """The depth of the stack that `container` is, or None if it is none."""
    if not len(container) or not all(
        any(True for _ in member.children()) and any(True for _ in member.parameters()) for member in container
    ):
        return None
    nearest = next(_configs(owner, path), None)
    if nearest is None:
        return None
    if _shared(owner, path, container):
        return int(nearest.num_hidden_layers)
    return len(container) if _depth_names(nearest, path, len(container), private=nearest is not owner.config) else None


def _shared(owner: PreTrainedModel, path: str, container: nn.ModuleList) -> bool:
    nearest = next(_configs(owner, path), None)
    return nearest is not None and getattr(nearest, SHARED_GROUPS_NAME, None) == len(container)


def _configs(owner: PreTrainedModel, path: str) -> Iterator[PreTrainedConfig]:
    """The distinct configs of the modules that `path` goes through, from the inside out, if they state a depth."""
    seen: list[PreTrainedConfig] = []
    parts = path.split(".")
    for length in range(len(parts) - 1, -1, -1):
        config = getattr(owner.get_submodule(".".join(parts[:length])), "config", None)
        states_depth = isinstance(config, PreTrainedConfig) and any(type(getattr(config, name, None)) is int for name in DEPTH_NAMES)
        if isinstance(config, PreTrainedConfig) and states_depth and not any(config is other for other in seen):
            seen.append(config)
            yield config


def _depth_configs(owner: PreTrainedModel, path: str, depth: int) -> Iterator[tuple[PreTrainedConfig, tuple[str, ...]]]:
    for config in _configs(owner, path):
        names = _depth_names(config, path, depth, private=config is not owner.config)
        if names:
            yield config, names


def _depth_names(config: PreTrainedConfig, path: str, depth: int, private: bool) -> tuple[str, ...]:
    """The names under which `config` states the depth of the stack at `path`.

    An encoder is not measured by a decoder's name. A decoder is, where there is such a name; a config that is the
    decoder's own (`private`, as in T5) may repeat the depth under the plain name.
    """
    aliases: dict[str, str] = getattr(config, "attribute_map", {})
    names = tuple(dict.fromkeys(aliases.get(name, name) for name in DEPTH_NAMES if type(getattr(config, name, None)) is int))
    side = _side(path)
    if side == "encoder":
        names = tuple(name for name in names if "decoder" not in name)
    elif side == "decoder" and not private and any("decoder" in name for name in names):
        names = tuple(name for name in names if "decoder" in name)
    return tuple(name for name in names if getattr(config, name) == depth)


def _side(path: str) -> str | None:
    return next((part for part in path.split(".") if part in ("encoder", "decoder")), None)


def _names(paths: list[str]) -> list[str]:
    if len(paths) == 1:
        return ["layers"]
    parts = [path.split(".") for path in paths]
    common = 0
    while len({tuple(part[: common + 1]) for part in parts}) == 1:
        common += 1
    return [part[common] for part in parts]
