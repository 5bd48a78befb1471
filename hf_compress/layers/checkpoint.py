"""What a checkpoint kept of the layers, beside what a run's model has: weights of other layers must not get into it.

config.json                          what was kept, as `layers.record` writes it
trainer_state.json                   the same, as LayerDropCallback's state
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from torch import nn
from transformers.trainer_utils import get_last_checkpoint

from hf_compress.errors import LayerDropError
from hf_compress.layers.peft import base_of, holds_adapter
from hf_compress.layers.record import KeptLayers, described, kept_layers, recorded_drop
from hf_compress.layers.stack import pretrained_model
from hf_compress.layers.strategies import describe_layers

# Under this name a Trainer's state keeps what LayerDropCallback says of itself.
CALLBACK = "LayerDropCallback"


def recorded_in_checkpoint(args: Any) -> dict[str, KeptLayers] | None:
    """What the checkpoint that `args` resumes from kept; None if there is no such checkpoint, or adapters only
    whose base is not on this machine.

    Raises LayerDropError if it holds a model that has lost no layers.
    """
    checkpoint = getattr(args, "resume_from_checkpoint", None)
    file = _config_file(checkpoint)
    if file is None:
        return None
    recorded = recorded_drop(json.loads(file.read_text(encoding="utf-8")))
    if recorded is None:
        raise LayerDropError(
            f"The checkpoint to resume from ({checkpoint}) holds a model that has lost no layers, and this run drops some: its weights "
            "would get into the wrong ones. Resume without dropping, or start anew in another output_dir."
        )
    return recorded


def checkpoint_folder(checkpoint: Any, output_dir: str | None) -> Any:
    """The checkpoint that is meant: a folder as it is, and for True the newest in `output_dir`."""
    if checkpoint is True and output_dir and Path(output_dir).is_dir():
        newest: Callable[[str], str | None] = get_last_checkpoint
        return newest(output_dir)
    return checkpoint


def refuse_other_layers(checkpoint: Any, model: nn.Module) -> None:
    """See that a checkpoint's config records the same layers as the model's.

    Args:
        checkpoint: a folder; what is no folder, and one without a config, passes; for adapters their base's counts.
        model: with the layers that it will be trained with.

    Raises:
        LayerDropError: naming both, and what the checkpoint's run was asked for.
    """
    file = _config_file(checkpoint)
    if file is None:
        return
    saved = recorded_drop(json.loads(file.read_text(encoding="utf-8"))) or {}
    present = recorded_drop(pretrained_model(model).config) or {}
    if kept_layers(saved) == kept_layers(present):
        return
    asked = dict(next(iter(saved.values())).request) if saved else {}
    said = ", ".join(f"{name}={list(value) if isinstance(value, tuple) else value}" for name, value in asked.items())
    raise LayerDropError(
        f"The checkpoint to resume from ({checkpoint}) {described(saved)}, and the model of this run {described(present)}: its weights "
        "would get into the wrong layers. "
        + (f"Give this run the flags of the one that wrote it ({said}), " if said else "Resume without dropping layers, ")
        + "or start anew in another output_dir."
    )


def _config_file(checkpoint: Any) -> Path | None:
    """The config of a checkpoint, or of the base of the adapters that it holds; None where there is none on this machine."""
    if not isinstance(checkpoint, str):
        return None
    folder = Path(checkpoint)
    if holds_adapter(folder):
        try:
            folder = Path(base_of(folder))
        except LayerDropError:
            return None
    return folder / "config.json" if (folder / "config.json").is_file() else None


def check_checkpoint(state: Any, recorded: Mapping[str, KeptLayers], *, may_be_older: bool) -> None:
    """Raise LayerDropError if the run that is resumed kept other layers than the model has.

    A state without this callback is a run's that had none; `may_be_older` says that the model was dropped before this run.
    """
    written = (getattr(state, "stateful_callbacks", None) or {}).get(CALLBACK)
    if written is None and not may_be_older:
        raise LayerDropError(
            "The checkpoint to resume from was saved by a run without LayerDropCallback, and this run drops layers: its weights "
            "would get into the wrong ones. Resume without dropping, or start anew in another output_dir."
        )
    for entry in written if isinstance(written, list) else [written or {}]:
        for name, kept in entry.get("attributes", {}).get("kept", {}).items():
            if name not in recorded or list(recorded[name].kept) != list(kept):
                now = describe_layers(recorded[name].kept) if name in recorded else "other layers"
                raise LayerDropError(
                    f"The checkpoint to resume from kept layers {describe_layers(tuple(kept))}, and the model of this run has {now}: its "
                    "weights do not belong there. Ask for the same layers, or start anew in another output_dir."
                )
