"""What a warm start reached, written into the student's config, so that it travels with the checkpoint.

config.hf_compress = {"warm_start": {"init": "pca", "layer_map": "1:2,2:4,3:6", "errors": [0.23, ...], "num_tokens": 16412, "head": true}}
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from hf_compress.layers.record import CONFIG_KEY

WARM_START_KEY = "warm_start"


@dataclass(frozen=True)
class WarmStartRecord:
    """What a warm start reached.

    Attributes:
        layer_map: student:teacher, the layers that were compared; embeddings with embeddings too.
        errors: of the embeddings and of each student layer: the part of the variance of the teacher's hidden states that the projected
            student's miss, on examples that were not fitted. At 1 the student knows no more than their mean.
        num_tokens: in the sample.
        head: whether the head was fitted too; else it starts at random.
    """

    layer_map: str
    errors: tuple[float, ...]
    num_tokens: int
    head: bool


def record_warm_start(config: Any, record: WarmStartRecord) -> None:
    """Write it into a config; other entries stay."""
    written = dict(getattr(config, CONFIG_KEY, None) or {})
    written[WARM_START_KEY] = {
        "init": "pca",
        "layer_map": record.layer_map,
        "errors": [round(error, 4) for error in record.errors],
        "num_tokens": record.num_tokens,
        "head": record.head,
    }
    setattr(config, CONFIG_KEY, written)


def recorded_warm_start(config: Any) -> WarmStartRecord | None:
    """What stands in a config; None where the student did not start warm."""
    written = getattr(config, CONFIG_KEY, None)
    entry = written.get(WARM_START_KEY) if isinstance(written, dict) else None
    if not isinstance(entry, dict):
        return None
    return WarmStartRecord(str(entry["layer_map"]), tuple(map(float, entry["errors"])), int(entry["num_tokens"]), bool(entry["head"]))


def describe_warm_start(record: WarmStartRecord) -> str:
    """Two or three lines for people."""
    errors = "  ".join(f"{layer}: {error:.2f}" for layer, error in enumerate(record.errors))
    lines = [
        f"weights fitted to the teacher's hidden states on {record.num_tokens:,} tokens, layers {record.layer_map} (student:teacher)",
        f"missed of their variance, by layer, 0 the embeddings, on texts that were not fitted: {errors}",
    ]
    if not record.head:
        lines.append("the head is none that can be fitted: it starts at random")
    return "\n".join(lines)
