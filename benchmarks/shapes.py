"""The shapes of the two kinds of students whose speed the papers give."""

from __future__ import annotations

from typing import Any

from speed import STUDENT
from transformers import BertConfig, BertForSequenceClassification, PreTrainedModel

from hf_compress.students.pruned_config import PrunedBertConfig
from hf_compress.students.pruned_models import PrunedBertForSequenceClassification

ROSITA = {"num_hidden_layers": 6, "num_attention_heads": 2, "attention_head_size": 64, "intermediate_size": 768, "embedding_size": 128}
NAMES = ("TinyBERT4", "ROSITA6")


def small_student(name: str, words: dict[str, Any]) -> PreTrainedModel:
    """A classifier of random weights: narrow (TinyBERT4), or as wide as its teacher and pruned (ROSITA6).

    Args:
        name: one of `NAMES`.
        words: the config's vocabulary and positions.
    """
    if name == "TinyBERT4":
        return BertForSequenceClassification(BertConfig(**words, **STUDENT))
    return PrunedBertForSequenceClassification(PrunedBertConfig(**words, **ROSITA))
