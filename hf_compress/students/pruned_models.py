"""BERT, RoBERTa and DistilBERT with fewer heads than fill the width, and with factorised word embeddings.

Each class is the transformers class of the same name after "Pruned", built as usual and then cut to its config: the forward is the
parent's, and so are the names of the weights. Importing this module registers the classes, so that AutoModelFor... loads them.
"""

# mypy: disable-error-code="no-untyped-call"
# (what transformers runs when a class is defined or finished has no type hints)

from __future__ import annotations

from typing import Any

from torch import nn
from transformers import PreTrainedModel
from transformers.models.auto import modeling_auto as auto
from transformers.models.bert import modeling_bert as bert
from transformers.models.distilbert import modeling_distilbert as distilbert
from transformers.models.roberta import modeling_roberta as roberta

from hf_compress.students.encoder_parts import linear, parts_of
from hf_compress.students.factorized_embedding import FactorizedDecoder, FactorizedEmbedding
from hf_compress.students.pruned_config import PrunedBertConfig, PrunedDistilBertConfig, PrunedRobertaConfig


class Pruned(PreTrainedModel):
    """What pruned models have in common: how they are built.

    Args:
        config: a pruned config.
        arguments, options: as of the parent.
    """

    def __init__(self, config: Any, *arguments: Any, **options: Any) -> None:
        heads = config.num_attention_heads
        config.num_attention_heads = 1  # the parent wants a number that divides the width; the heads are cut afterwards
        try:
            super().__init__(config, *arguments, **options)
        finally:
            config.num_attention_heads = heads
        cut_to_config(self)
        self.post_init()  # once more: new weights are initialised and tied

    def set_output_embeddings(self, new_embeddings: nn.Module) -> None:
        """Take over weight and bias of a layer of another vocabulary, which transformers makes when it resizes the embeddings."""
        decoder = self.get_output_embeddings()
        if isinstance(decoder, FactorizedDecoder) and isinstance(new_embeddings, nn.Linear) and new_embeddings is not decoder:
            decoder.weight, decoder.bias, decoder.out_features = new_embeddings.weight, new_embeddings.bias, new_embeddings.out_features
            new_embeddings = decoder
        super().set_output_embeddings(new_embeddings)


def cut_to_config(model: PreTrainedModel) -> None:
    """Replace what the config says is narrower than in the parent class by new modules, not initialised."""
    config: Any = model.config
    parts = parts_of(config.model_type)
    encoder: Any = model.base_model
    assert parts is not None
    units = config.num_attention_heads * config.attention_head_size
    for layer in encoder.get_submodule(parts.layers):
        attention = layer.get_submodule(parts.attention)
        setattr(attention, parts.heads, config.num_attention_heads)
        attention.attention_head_size = config.attention_head_size
        attention.scaling = config.attention_head_size**-0.5
        if hasattr(attention, "all_head_size"):
            attention.all_head_size = units
        if linear(layer, parts.query).out_features == units:
            continue
        for path in parts.projections:
            layer.set_submodule(path, nn.Linear(config.hidden_size, units))
        layer.set_submodule(parts.attention_output, nn.Linear(units, config.hidden_size))
    if config.embedding_size == config.hidden_size:
        return
    words, rank = config.vocab_size, config.embedding_size
    embedding = FactorizedEmbedding(words, rank, config.hidden_size, encoder.get_submodule(parts.word_embeddings).padding_idx)
    encoder.set_submodule(parts.word_embeddings, embedding)
    if model.get_output_embeddings() is not None:
        model.set_submodule(parts.decoder, FactorizedDecoder(config.hidden_size, rank, words))
        source = f"{model.base_model_prefix}.{parts.word_embeddings}.projection.weight"
        model._tied_weights_keys = {**(model._tied_weights_keys or {}), f"{parts.decoder}.projection.weight": source}


class PrunedBertModel(Pruned, bert.BertModel):
    """A pruned BERT without a head."""

    config_class = PrunedBertConfig


class PrunedBertForSequenceClassification(Pruned, bert.BertForSequenceClassification):
    """A pruned BERT that classifies texts."""

    config_class = PrunedBertConfig


class PrunedBertForTokenClassification(Pruned, bert.BertForTokenClassification):
    """A pruned BERT that classifies tokens."""

    config_class = PrunedBertConfig


class PrunedBertForQuestionAnswering(Pruned, bert.BertForQuestionAnswering):
    """A pruned BERT that finds answers in a text."""

    config_class = PrunedBertConfig


class PrunedBertForMultipleChoice(Pruned, bert.BertForMultipleChoice):
    """A pruned BERT that chooses among texts."""

    config_class = PrunedBertConfig


class PrunedBertForMaskedLM(Pruned, bert.BertForMaskedLM):
    """A pruned BERT that fills in words."""

    config_class = PrunedBertConfig


class PrunedRobertaModel(Pruned, roberta.RobertaModel):
    """A pruned RoBERTa without a head."""

    config_class = PrunedRobertaConfig


class PrunedRobertaForSequenceClassification(Pruned, roberta.RobertaForSequenceClassification):
    """A pruned RoBERTa that classifies texts."""

    config_class = PrunedRobertaConfig


class PrunedRobertaForTokenClassification(Pruned, roberta.RobertaForTokenClassification):
    """A pruned RoBERTa that classifies tokens."""

    config_class = PrunedRobertaConfig


class PrunedRobertaForQuestionAnswering(Pruned, roberta.RobertaForQuestionAnswering):
    """A pruned RoBERTa that finds answers in a text."""

    config_class = PrunedRobertaConfig


class PrunedRobertaForMultipleChoice(Pruned, roberta.RobertaForMultipleChoice):
    """A pruned RoBERTa that chooses among texts."""

    config_class = PrunedRobertaConfig


class PrunedRobertaForMaskedLM(Pruned, roberta.RobertaForMaskedLM):
    """A pruned RoBERTa that fills in words."""

    config_class = PrunedRobertaConfig


class PrunedDistilBertModel(Pruned, distilbert.DistilBertModel):
    """A pruned DistilBERT without a head."""

    config_class = PrunedDistilBertConfig


class PrunedDistilBertForSequenceClassification(Pruned, distilbert.DistilBertForSequenceClassification):
    """A pruned DistilBERT that classifies texts."""

    config_class = PrunedDistilBertConfig


class PrunedDistilBertForTokenClassification(Pruned, distilbert.DistilBertForTokenClassification):
    """A pruned DistilBERT that classifies tokens."""

    config_class = PrunedDistilBertConfig


class PrunedDistilBertForQuestionAnswering(Pruned, distilbert.DistilBertForQuestionAnswering):
    """A pruned DistilBERT that finds answers in a text."""

    config_class = PrunedDistilBertConfig


class PrunedDistilBertForMultipleChoice(Pruned, distilbert.DistilBertForMultipleChoice):
    """A pruned DistilBERT that chooses among texts."""

    config_class = PrunedDistilBertConfig


class PrunedDistilBertForMaskedLM(Pruned, distilbert.DistilBertForMaskedLM):
    """A pruned DistilBERT that fills in words."""

    config_class = PrunedDistilBertConfig


# What a class's name ends in -> the automatic class that loads it.
_AUTOMATIC: dict[str, Any] = {
    "Model": auto.AutoModel,
    "ForSequenceClassification": auto.AutoModelForSequenceClassification,
    "ForTokenClassification": auto.AutoModelForTokenClassification,
    "ForQuestionAnswering": auto.AutoModelForQuestionAnswering,
    "ForMultipleChoice": auto.AutoModelForMultipleChoice,
    "ForMaskedLM": auto.AutoModelForMaskedLM,
}
# A plain class -> its pruned counterpart, and that one itself, which can be pruned again.
PRUNED_CLASSES: dict[type[PreTrainedModel], type[Pruned]] = {}
for _model in Pruned.__subclasses__():
    PRUNED_CLASSES.update({_model: _model, _model.__mro__[2]: _model})
    _ending = next(ending for ending in _AUTOMATIC if _model.__name__.endswith(ending))
    _AUTOMATIC[_ending].register(_model.config_class, _model, exist_ok=True)
