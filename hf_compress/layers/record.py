"""What dropping kept, written into the model's config, so that it travels with the checkpoint.

    config.hf_compress = {"layer_drop": {"layers": {"kept": [1, 2, 5, 6], "num_layers": 6, "request": {"strategy": "symmetric"}}}}

There is one entry for each stack: "layers", or "encoder" and "decoder". Layers are counted from 1 in the full model. While layers go
one after another (`layers.schedule`), an entry has "to_drop" too: those still to go, in their order.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from hf_compress.layers.strategies import describe_layers

CONFIG_KEY = "hf_compress"
DROP_KEY = "layer_drop"


@dataclass(frozen=True)
class KeptLayers:
    """The layers of one stack that dropping kept.

    `kept` counts from 1 in the full model of `num_layers`; `request` holds what was asked for, without what was left out; `to_drop` are
    those of the kept layers that a schedule is still to drop, the next one first.
    """

    kept: tuple[int, ...]
    num_layers: int
    request: tuple[tuple[str, Any], ...] = ()
    to_drop: tuple[int, ...] = ()

    @property
    def dropped(self) -> tuple[int, ...]:
        """The layers that went, counted from 1 in the full model."""
        return tuple(layer for layer in range(1, self.num_layers + 1) if layer not in self.kept)


def recorded_drop(config: Any) -> dict[str, KeptLayers] | None:
    """What was kept of the model with this config, by stack; None if no layer was dropped.

    `config` is a transformers config or what lies in a config.json, as a dict.
    """
    return {name: each for name, each in (recorded_layers(config) or {}).items() if each.dropped} or None


def recorded_layers(config: Any) -> dict[str, KeptLayers] | None:
    """The same, and the stacks of which a schedule has dropped no layer yet."""
    written = config.get(CONFIG_KEY) if isinstance(config, dict) else getattr(config, CONFIG_KEY, None)
    if not isinstance(written, dict) or not written.get(DROP_KEY):
        return None
    return {
        name: KeptLayers(
            kept=tuple(int(layer) for layer in entry["kept"]),
            num_layers=int(entry["num_layers"]),
            request=tuple(sorted((key, _frozen(value)) for key, value in entry.get("request", {}).items())),
            to_drop=tuple(int(layer) for layer in entry.get("to_drop", ())),
        )
        for name, entry in written[DROP_KEY].items()
    }


def kept_layers(recorded: Mapping[str, KeptLayers]) -> dict[str, tuple[tuple[int, ...], int]]:
    """What makes two records the same model: the layers that stayed, and of how many; not in which words they were asked for."""
    return {name: (each.kept, each.num_layers) for name, each in recorded.items()}


def described(recorded: Mapping[str, KeptLayers]) -> str:
    """What is recorded, in words that go on a sentence about a model: "kept layers 1-4 of 6"; "has lost no layers" where it is nothing."""
    kept = [
        ("" if name == "layers" else f"in the {name} ") + f"kept layers {describe_layers(each.kept)} of {each.num_layers}"
        for name, each in recorded.items()
    ]
    return " and ".join(kept) or "has lost no layers"


def record_drop(config: Any, stacks: dict[str, KeptLayers]) -> None:
    """Write what was kept of each of these stacks into `config`; other stacks' entries stay."""
    written = dict(getattr(config, CONFIG_KEY, None) or {})
    entries = dict(written.get(DROP_KEY) or {})
    for name, kept in stacks.items():
        request = {key: list(value) if isinstance(value, tuple) else value for key, value in kept.request}
        entries[name] = {"kept": list(kept.kept), "num_layers": kept.num_layers, "request": request}
        if kept.to_drop:
            entries[name]["to_drop"] = list(kept.to_drop)
    written[DROP_KEY] = entries
    setattr(config, CONFIG_KEY, written)


def _frozen(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value
