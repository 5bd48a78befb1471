"""What a warm start needs to know of an encoder beyond `encoder_parts`: its LayerNorms, and its heads for tasks."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn
from transformers import PreTrainedModel

from hf_compress.errors import TeacherError
from hf_compress.students.encoder_parts import PARTS, EncoderParts


@dataclass(frozen=True)
class EncoderNorms:
    """Paths of the LayerNorms: after the sum of embeddings, and in each layer after attention and after the feed-forward layer."""

    embeddings: str
    attention: str
    feed_forward: str


_BERT = EncoderNorms("embeddings.LayerNorm", "attention.output.LayerNorm", "output.LayerNorm")
NORMS = {
    "bert": _BERT,
    "roberta": _BERT,
    "distilbert": EncoderNorms("embeddings.LayerNorm", "sa_layer_norm", "output_layer_norm"),
}

# A layer as wide as the encoder, which some heads have, then the one that answers; the first pair that a model has is its head.
_HEADS = (
    ("bert.pooler.dense", "classifier"),
    ("classifier.dense", "classifier.out_proj"),
    ("pre_classifier", "classifier"),
    ("pooler.dense", None),
    (None, "classifier"),
    (None, "qa_outputs"),
)


@dataclass(frozen=True)
class Head:
    """Paths in the model, each of an `nn.Linear`; None where there is none."""

    dense: str | None
    answer: str | None


def warm_parts_of(model: PreTrainedModel) -> tuple[EncoderParts, EncoderNorms]:
    """Where an encoder keeps what.

    Raises:
        TeacherError: the architecture is another than BERT, RoBERTa or DistilBERT.
    """
    name = str(model.config.model_type)
    if name not in NORMS:
        raise TeacherError(
            f"init='pca' knows the encoders of {', '.join(NORMS)}, whose layers end in a LayerNorm, and the teacher is a {name}. "
            "Leave init out for random weights, or keep layers of the teacher at its own width."
        )
    return PARTS[name], NORMS[name]


def head_of(model: PreTrainedModel) -> Head | None:
    """The head on top of the encoder; None where there is none, or one that a warm start does not know."""
    for dense, answer in _HEADS:
        if all(path is None or _is_linear(model, path) for path in (dense, answer)):
            return Head(dense, answer)
    return None


def _is_linear(model: nn.Module, path: str) -> bool:
    try:
        return isinstance(model.get_submodule(path), nn.Linear)
    except AttributeError:
        return False
