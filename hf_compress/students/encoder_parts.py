"""Where encoders of the BERT family keep what pruning cuts: attention, feed-forward layer, word embeddings."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn


@dataclass(frozen=True)
class EncoderParts:
    """Paths, in a layer unless said otherwise.

    Attributes:
        attention: the module that splits the width into heads.
        heads: the names under which that module counts them.
        query, key, value: width -> heads, one row a unit.
        attention_output: heads -> width, one column a unit.
        feed_forward_input: width -> neurons.
        feed_forward_output: neurons -> width.
        intermediate_size: what the config calls the number of neurons.
        layers: in the encoder, the list of layers.
        word_embeddings: in the encoder.
        decoder: in a masked language model, the tied layer that scores words.
    """

    attention: str
    heads: str
    query: str
    key: str
    value: str
    attention_output: str
    feed_forward_input: str
    feed_forward_output: str
    intermediate_size: str
    layers: str
    word_embeddings: str
    decoder: str

    @property
    def projections(self) -> tuple[str, str, str]:
        """Query, key and value."""
        return self.query, self.key, self.value


_BERT = {
    "attention": "attention.self",
    "heads": "num_attention_heads",
    "query": "attention.self.query",
    "key": "attention.self.key",
    "value": "attention.self.value",
    "attention_output": "attention.output.dense",
    "feed_forward_input": "intermediate.dense",
    "feed_forward_output": "output.dense",
    "intermediate_size": "intermediate_size",
    "layers": "encoder.layer",
    "word_embeddings": "embeddings.word_embeddings",
}
PARTS: dict[str, EncoderParts] = {
    "bert": EncoderParts(**_BERT, decoder="cls.predictions.decoder"),
    "roberta": EncoderParts(**_BERT, decoder="lm_head.decoder"),
    "distilbert": EncoderParts(
        attention="attention",
        heads="n_heads",
        query="attention.q_lin",
        key="attention.k_lin",
        value="attention.v_lin",
        attention_output="attention.out_lin",
        feed_forward_input="ffn.lin1",
        feed_forward_output="ffn.lin2",
        intermediate_size="hidden_dim",
        layers="transformer.layer",
        word_embeddings="embeddings.word_embeddings",
        decoder="vocab_projector",
    ),
}


def parts_of(model_type: str) -> EncoderParts | None:
    """The parts of a model of that type, pruned before or not; None for other architectures."""
    return PARTS.get(model_type.removeprefix("pruned_"))


def linear(layer: nn.Module, path: str) -> nn.Linear:
    """A linear layer inside an encoder's layer."""
    found = layer.get_submodule(path)
    assert isinstance(found, nn.Linear)
    return found
