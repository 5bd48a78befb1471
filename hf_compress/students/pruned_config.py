"""Configs of pruned encoders: fewer heads than fill the width, and word embeddings of a lower rank than the width.

    BERT    query, key, value   width -> heads * (width / heads)         word embeddings   vocabulary x width
    pruned  query, key, value   width -> heads * attention_head_size     word embeddings   vocabulary x rank, rank x width

A plain config cannot say either: 2 heads of 64 in a width of 768 would be read as 2 heads of 384. Hence model types of their own.
Importing this module registers them with AutoConfig, see `registration.py`; the first config that is made imports, and so registers, the
models, of which a script that only looks at configs or tokenizers has no need.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

from transformers.models.auto.configuration_auto import AutoConfig
from transformers.models.bert.configuration_bert import BertConfig
from transformers.models.distilbert.configuration_distilbert import DistilBertConfig
from transformers.models.roberta.configuration_roberta import RobertaConfig

MODELS = "hf_compress.students.pruned_models"


class PrunedBertConfig(BertConfig):
    """BERT's config, and the two sizes that it cannot state.

    Attributes:
        attention_head_size: of each of the `num_attention_heads`; by default hidden_size / num_attention_heads, as in BERT.
        embedding_size: the rank of the word embeddings, which a projection brings to hidden_size; by default hidden_size, without one.
    """

    model_type = "pruned_bert"
    attention_head_size: int | None = None
    embedding_size: int | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        """Fill in the defaults."""
        super().__post_init__(**kwargs)  # type: ignore[no-untyped-call]
        _complete(self)


class PrunedRobertaConfig(RobertaConfig):
    """RoBERTa's config, with the sizes of `PrunedBertConfig`."""

    model_type = "pruned_roberta"
    attention_head_size: int | None = None
    embedding_size: int | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        """Fill in the defaults."""
        super().__post_init__(**kwargs)  # type: ignore[no-untyped-call]
        _complete(self)


class PrunedDistilBertConfig(DistilBertConfig):
    """DistilBERT's config, with the sizes of `PrunedBertConfig`."""

    model_type = "pruned_distilbert"
    attention_head_size: int | None = None
    embedding_size: int | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        """Fill in the defaults."""
        super().__post_init__(**kwargs)  # type: ignore[no-untyped-call]
        _complete(self)


PrunedConfig = PrunedBertConfig | PrunedRobertaConfig | PrunedDistilBertConfig

for _config in (PrunedBertConfig, PrunedRobertaConfig, PrunedDistilBertConfig):
    AutoConfig.register(_config.model_type, _config, exist_ok=True)


def _complete(config: Any) -> None:
    if config.attention_head_size is None:
        config.attention_head_size = config.hidden_size // config.num_attention_heads
    if config.embedding_size is None:
        config.embedding_size = config.hidden_size
    import_module(MODELS)  # registers them
