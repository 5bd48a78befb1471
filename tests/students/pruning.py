"""What the tests of pruning share: a teacher with four heads a layer, and labelled batches for it."""

from __future__ import annotations

from typing import Any

import torch
from transformers import PreTrainedModel

from tests.tiny_models import tiny_batch, tiny_model

HEADS = 4
HEAD_SIZE = 4
NEURONS = 24
FAMILIES = ("bert", "roberta", "distilbert")


def teacher(family: str = "bert", *, num_layers: int = 3, **more: Any) -> PreTrainedModel:
    """A tiny model of width 16 with 4 heads of size 4 and 24 neurons in each layer."""
    heads = "n_heads" if family == "distilbert" else "num_attention_heads"
    return tiny_model(family, num_layers=num_layers, **{heads: HEADS}, **more)


def labelled(model: PreTrainedModel, *, batches: int = 2, batch_size: int = 16) -> list[dict[str, torch.Tensor]]:
    """Batches with labels, of texts of three lengths."""
    made = [tiny_batch(model, batch_size, labels=True, seed=seed) for seed in range(batches)]
    if type(model).__name__.endswith("MultipleChoice"):
        for batch in made:
            batch.update({name: value.view(batch_size // 2, 2, -1) for name, value in batch.items() if name != "labels"})
            batch["labels"] = torch.arange(batch_size // 2) % 2
    return made
