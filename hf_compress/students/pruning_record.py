"""What pruning kept, written into the student's config, so that it travels with the checkpoint.

    config.hf_compress = {"pruning": {"heads": [[3, 7], ...], "num_heads": 12, "neurons": [768, 3072],
                                      "rank": [128, 768], "embedding_share": 0.87, "num_examples": 512, "faithful": null}}

Which layers were kept stands beside it, as `layers/record.py` writes it.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from typing import Any

from hf_compress.layers.record import CONFIG_KEY, recorded_drop
from hf_compress.layers.strategies import describe_layers

PRUNING_KEY = "pruning"


@dataclass(frozen=True)
class Pruning:
    """What was kept of a teacher.

    Attributes:
        heads: for each of the student's layers the teacher's heads that were kept, counted from 1.
        num_heads: how many heads a layer of the teacher has.
        neurons: kept and there before, in each layer.
        rank: of the word embeddings, now and before.
        embedding_share: which share of the sum of squares of the word embeddings the factors reproduce, 0 to 1.
        num_examples: on how many examples importance was measured; 0 if nothing was to be ranked.
        faithful: "released_code" if importance was measured as ROSITA's code does.
    """

    heads: tuple[tuple[int, ...], ...]
    num_heads: int
    neurons: tuple[int, int]
    rank: tuple[int, int]
    embedding_share: float
    num_examples: int
    faithful: str | None = None


def record_pruning(config: Any, pruning: Pruning) -> None:
    """Write it into a config."""
    written = json.loads(json.dumps(asdict(pruning)))  # with lists for tuples, as it will be read from a file
    setattr(config, CONFIG_KEY, {**(getattr(config, CONFIG_KEY, None) or {}), PRUNING_KEY: written})


def recorded_pruning(config: Any) -> Pruning | None:
    """What was kept of the model with this config; None if it was not pruned."""
    written = getattr(config, CONFIG_KEY, None)
    if not isinstance(written, dict) or PRUNING_KEY not in written:
        return None
    values = dict(written[PRUNING_KEY])
    pairs = {name: (int(values[name][0]), int(values[name][1])) for name in ("neurons", "rank")}
    heads = tuple(tuple(int(head) for head in layer) for layer in values["heads"])
    return Pruning(**{**values, **pairs, "heads": heads})


def describe_pruning(config: Any) -> str:
    """A few lines for people: layers, heads of each layer, neurons and embeddings.

    Args:
        config: of a student that `prune_student` made.
    """
    pruning = recorded_pruning(config)
    assert pruning is not None
    dropped = (recorded_drop(config) or {}).get("layers")
    depth = len(pruning.heads)
    kept = tuple(range(1, depth + 1)) if dropped is None else dropped.kept
    lines = [f"layers      kept {describe_layers(kept)} of {depth if dropped is None else dropped.num_layers}"]
    if all(len(heads) == pruning.num_heads for heads in pruning.heads):
        lines.append(f"heads       all {pruning.num_heads} of each layer")
    else:
        for layer, heads in zip(kept, pruning.heads, strict=True):
            lines.append(f"{'heads' if layer == kept[0] else '':<12}layer {layer}: {describe_layers(heads)} of {pruning.num_heads}")
    lines.append(f"neurons     {pruning.neurons[0]} of {pruning.neurons[1]} in each layer")
    rank, width = pruning.rank
    share = "as they were" if rank == width else f"{pruning.embedding_share:.1%} of their sum of squares"
    lines.append(f"embeddings  rank {rank} of {width}: {share}")
    if pruning.num_examples:
        faithful = f", as in {pruning.faithful}" if pruning.faithful else ""
        lines.append(f"importance measured on {pruning.num_examples} examples{faithful}")
    return "\n".join(lines)
