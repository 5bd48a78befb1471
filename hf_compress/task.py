"""What a model is for, read off its class and its config: it decides what an example is, and where labels and logits stand."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any, Literal

from torch import nn
from transformers.models.auto import modeling_auto

from hf_compress.attention import shows_scores
from hf_compress.layers.layer_map import LayerMap, map_between
from hf_compress.layers.record import recorded_layers
from hf_compress.layers.stack import find_stacks, pretrained_model, unwrap
from hf_compress.signals import VectorKind

Kind = Literal[
    "sequence_classification",
    "token_classification",
    "causal_lm",
    "masked_lm",
    "seq2seq_lm",
    "question_answering",
    "multiple_choice",
    "other",
]

# A kind of task, and transformers' own table of the classes that serve it; BART's stands in two of them, so the order matters.
_TABLES: dict[Kind, tuple[str, str]] = {
    "seq2seq_lm": ("MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES", "AutoModelForSeq2SeqLM"),
    "sequence_classification": ("MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES", "AutoModelForSequenceClassification"),
    "token_classification": ("MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING_NAMES", "AutoModelForTokenClassification"),
    "causal_lm": ("MODEL_FOR_CAUSAL_LM_MAPPING_NAMES", "AutoModelForCausalLM"),
    "masked_lm": ("MODEL_FOR_MASKED_LM_MAPPING_NAMES", "AutoModelForMaskedLM"),
    "question_answering": ("MODEL_FOR_QUESTION_ANSWERING_MAPPING_NAMES", "AutoModelForQuestionAnswering"),
    "multiple_choice": ("MODEL_FOR_MULTIPLE_CHOICE_MAPPING_NAMES", "AutoModelForMultipleChoice"),
}

# Tasks with one prediction a token: their labels are as long as their inputs.
TOKEN_KINDS: frozenset[Kind] = frozenset({"token_classification", "causal_lm", "masked_lm"})
# Tasks whose logits are the labels that the model's config counts and names.
LABELLED_KINDS: frozenset[Kind] = frozenset({"sequence_classification", "token_classification"})


def kind_of(model: nn.Module) -> Kind:
    """What the model is for."""
    return kind_of_classes(tuple(cls.__name__ for cls in type(unwrap(model)).__mro__))  # a script's own subclass is of its parent's kind


def kind_of_classes(class_names: tuple[str, ...]) -> Kind:
    """What a model is for, by its class's name and those of its parents."""
    tables: dict[Kind, set[str]] = {kind: _classes(table) for kind, (table, _) in _TABLES.items()}
    for name in class_names:
        for kind, names in tables.items():
            if name.removeprefix("Pruned") in names:  # a pruned class is not in transformers' tables, its parent is
                return kind
    return "other"


@cache
def _classes(table: str) -> set[str]:
    """The names in one of transformers' tables."""
    entries = getattr(modeling_auto, table).values()
    return {name for entry in entries for name in ((entry,) if isinstance(entry, str) else entry)}


def auto_class_name(kind: Kind) -> str | None:
    """The transformers class that loads a model of this kind; None for "other"."""
    return _TABLES[kind][1] if kind in _TABLES else None


@dataclass(frozen=True)
class Stack:
    """The size of one stack of layers."""

    num_layers: int
    hidden_size: int
    num_attention_heads: int
    # What dropping left, counted from 1 in a model of `full_depth` layers; None if nothing was dropped.
    kept: tuple[int, ...] | None = None
    full_depth: int = 0
    # A teacher on disk: it has the states of some tokens or some dimensions only.
    selected: bool = False
    # Of its attention: fewer heads of keys and values than of queries where they are grouped; 0 where it is as usual.
    num_key_value_heads: int = 0
    head_size: int = 0

    def vectors(self, kind: VectorKind) -> tuple[int, int]:
        """Number and width of the heads of queries, keys or values."""
        heads = self.num_attention_heads if kind == "queries" else self.num_key_value_heads or self.num_attention_heads
        return heads, self.head_size or self.hidden_size // max(1, self.num_attention_heads)

    def map_from(self, asked: LayerMap | str | None, teacher: Stack) -> LayerMap:
        """Which layer of this stack learns from which of the teacher's; see `map_between`."""
        return map_between(asked, self.num_layers, teacher.num_layers, self.kept, self.full_depth)


@dataclass(frozen=True)
class ModelShape:
    """What a loss must know of a model to ask it the right things."""

    name: str
    kind: Kind
    stacks: dict[str, Stack]
    shows_attention_scores: bool = True
    shows_attention_vectors: bool = True
    problem_type: str | None = None
    main_input: str = "input_ids"
    # A teacher on disk: it has so many of each token's logits only; 0 where it has all.
    top_logits: int = 0
    # As the config has it; empty for a teacher on disk, which does not say.
    model_type: str = ""

    @classmethod
    def of(cls, model: nn.Module) -> ModelShape:
        """Read the shape off a model."""
        inner = unwrap(model)
        config: Any = pretrained_model(model).config
        config = config.get_text_config()
        stacks = {}
        recorded = recorded_layers(pretrained_model(model).config) or {}
        for name, stack in find_stacks(model).items():
            heads = getattr(config, f"{name}_attention_heads", None) or getattr(config, "num_attention_heads", None) or 0
            record = recorded.get(name)
            kept, full_depth = (record.kept, record.num_layers) if record is not None else (None, 0)
            stacks[name] = Stack(
                stack.depth,
                int(config.hidden_size),
                int(heads),
                kept,
                full_depth,
                num_key_value_heads=int(getattr(config, "num_key_value_heads", None) or 0),
                head_size=int(getattr(config, "head_dim", None) or getattr(config, "attention_head_size", None) or 0),
            )
        owner = pretrained_model(model)
        problem: str | None = getattr(owner.config, "problem_type", None)
        shows = shows_scores(owner)
        vectors = shows and _heads_of_one_width(config)
        return cls(
            type(inner).__name__,
            kind_of(model),
            stacks,
            shows,
            vectors,
            problem,
            owner.main_input_name,
            model_type=str(owner.config.model_type),
        )


def _heads_of_one_width(config: Any) -> bool:
    """Whether queries, keys and values have heads of one width; in multi-head latent attention (DeepSeek) they have not."""
    names = ("head_dim", "qk_head_dim", "v_head_dim", "qk_nope_head_dim")
    size, of_keys, of_values, part = (getattr(config, name, None) for name in names)
    usual = size or int(config.hidden_size) // max(1, int(getattr(config, "num_attention_heads", None) or 1))
    return part is None and of_keys in (None, usual) and of_values in (None, usual)
