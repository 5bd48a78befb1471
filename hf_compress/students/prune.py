"""A student cut out of the teacher: its depth, its heads, its feed-forward neurons, and the rank of its word embeddings.

    teacher, labelled examples -> importance of heads and neurons
    teacher -> without some layers -> the best heads and neurons of each layer that is left -> word embeddings of lower rank -> student

As ROSITA (Liu et al. 2103.11367): of BERT-base 6 layers, 2 heads of 64, 768 neurons and rank 128 are 14.5 million parameters. The hidden
size stays the teacher's, so hidden states are compared without a projection.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from hf_compress.errors import ArgumentError, TeacherError
from hf_compress.layers.drop import drop_layers
from hf_compress.layers.record import CONFIG_KEY, recorded_drop
from hf_compress.layers.strategies import LayerDropStrategy
from hf_compress.students.encoder_parts import EncoderParts, parts_of
from hf_compress.students.factorized_embedding import embedding_matrix, factorize
from hf_compress.students.from_teacher import load_teacher
from hf_compress.students.importance import DEFAULT_EXAMPLES, Faithful, Importance, measure_importance, most_important
from hf_compress.students.pruned_models import PRUNED_CLASSES, Pruned
from hf_compress.students.pruning_record import Pruning, describe_pruning, record_pruning

logger = logging.getLogger(__name__)


def prune_student(
    teacher: PreTrainedModel | str,
    batches: Iterable[Mapping[str, Any]] | None = None,
    *,
    num_hidden_layers: int | None = None,
    layers_to_keep: Sequence[int] | None = None,
    layer_drop_strategy: LayerDropStrategy = "top",
    num_attention_heads: int | None = None,
    intermediate_size: int | None = None,
    embedding_rank: int | None = None,
    num_examples: int = DEFAULT_EXAMPLES,
    faithful: Faithful | None = None,
) -> PreTrainedModel:
    """Make a student out of the most important parts of a teacher; the teacher stays as it is.

    What is None is not pruned. Where nothing is, the student's outputs are the teacher's to the bit. The config records what was kept. A
    student with fewer heads or a lower rank is of a class of this package, such as `PrunedBertForSequenceClassification`: the script that
    loads it needs `import hf_compress`, or `hf-compress run`.

    Args:
        teacher: BERT, RoBERTa or DistilBERT with a head; or a folder or name to load it from.
        batches: labelled examples to measure importance on, as dicts of tensors (batch, ...); for heads, neurons and the strategy
            "contribution".
        num_hidden_layers: how many layers stay.
        layers_to_keep: which layers stay instead, counted from 1.
        layer_drop_strategy: which layers go, if only their number is given; "top" keeps the first ones, as ROSITA does.
        num_attention_heads: how many heads stay in each layer; they keep their size.
        intermediate_size: how many feed-forward neurons stay in each layer.
        embedding_rank: of the word embeddings, at most the hidden size; position embeddings stay.
        num_examples: so many of the examples are read.
        faithful: "released_code" to add up importance as ROSITA's code does; see `students/importance.py`.

    Raises:
        ArgumentError: nothing is asked for, or more than there is, or importance without examples.
        DataError: too few examples, or examples without labels.
        LayerDropError: layers that the teacher does not have.
        TeacherError: the teacher cannot be loaded, is of another architecture, or makes no loss of labels.

    Example:
        >>> student = prune_student(teacher, batches, num_hidden_layers=6, num_attention_heads=2,     # doctest: +SKIP
        ...                         intermediate_size=768, embedding_rank=128)
    """
    if layers_to_keep is not None and num_hidden_layers is not None:
        raise ArgumentError("layers_to_keep and num_hidden_layers contradict each other; give one of them.")
    if faithful not in (None, "released_code"):
        raise ArgumentError(f"faithful is {faithful!r}; expected 'released_code', or None for what is right.")
    asked = {
        "num_hidden_layers": num_hidden_layers,
        "num_attention_heads": num_attention_heads,
        "intermediate_size": intermediate_size,
        "embedding_rank": embedding_rank,
    }
    if layers_to_keep is None and all(number is None for number in asked.values()):
        raise ArgumentError(f"Say what is to be pruned: {', '.join(asked)} or layers_to_keep.")
    model = load_teacher(teacher) if isinstance(teacher, str) else teacher
    parts = check_architecture(model)
    before = _Sizes.of(model, parts)
    after = before.cut(asked)
    ranks = (after.heads, after.neurons) != (before.heads, before.neurons)
    drops = layers_to_keep is not None or after.layers < before.layers
    by_contribution = drops and layers_to_keep is None and layer_drop_strategy == "contribution"
    if (ranks or by_contribution) and batches is None:
        raise ArgumentError(
            f"{'Which heads and neurons stay' if ranks else 'Which layers contribute least'} is measured on labelled examples: give "
            "batches, or on the command line --task_name or --train_file."
        )

    source = copy.deepcopy(model)
    if hasattr(source.config, CONFIG_KEY):
        delattr(source.config, CONFIG_KEY)  # layers are counted in this teacher, whatever it was made from
    sample = list(islice(batches, num_examples)) if (ranks or by_contribution) and batches is not None else None
    if layers_to_keep is not None:
        drop_layers(source, layers_to_keep=layers_to_keep)
    elif drops:
        drop_layers(source, strategy=layer_drop_strategy, num_layers_to_drop=before.layers - after.layers, batches=sample)
    importance = None
    if ranks:
        assert sample is not None
        importance = measure_importance(model, parts, sample, num_examples=num_examples, faithful=faithful)
    student = _cut(source, parts, before, after, importance, faithful)
    logger.info("%s pruned:\n%s", type(model).__name__, describe_pruning(student.config))
    student.train(model.training)
    return student


def check_architecture(model: PreTrainedModel) -> EncoderParts:
    """Where a teacher keeps its parts.

    Raises:
        TeacherError: it is of an architecture that cannot be pruned.
    """
    parts = parts_of(model.config.model_type)
    if type(model) not in PRUNED_CLASSES or parts is None:
        known = sorted(plain.__name__ for plain in PRUNED_CLASSES if not issubclass(plain, Pruned))
        raise TeacherError(
            f"The teacher is a {type(model).__name__}, which cannot be pruned. These can: {', '.join(known)}. Of others, take layers: "
            "student_from_teacher, or `hf-compress student`."
        )
    if getattr(model.config, "is_decoder", False):
        raise TeacherError(f"This {type(model).__name__} is used as a decoder (config.is_decoder), which cannot be pruned; encoders can.")
    return parts


@dataclass(frozen=True)
class _Sizes:
    """What pruning changes, and the two sizes that it does not."""

    layers: int
    heads: int
    neurons: int
    rank: int
    head_size: int
    width: int

    @classmethod
    def of(cls, model: PreTrainedModel, parts: EncoderParts) -> _Sizes:
        config: Any = model.config
        head_size = getattr(config, "attention_head_size", None) or config.hidden_size // config.num_attention_heads
        rank = getattr(config, "embedding_size", None) or config.hidden_size
        neurons = getattr(config, parts.intermediate_size)
        return cls(config.num_hidden_layers, config.num_attention_heads, neurons, rank, head_size, config.hidden_size)

    def cut(self, asked: Mapping[str, int | None]) -> _Sizes:
        """The sizes asked for, in the order of the attributes; what is None stays.

        Raises:
            ArgumentError: more than there is, or none.
        """
        there = (
            (self.layers, f"{self.layers} layers"),
            (self.heads, f"{self.heads} heads in each layer"),
            (self.neurons, f"{self.neurons} feed-forward neurons in each layer"),
            (self.rank, f"word embeddings of rank {self.rank}"),
        )
        sizes: list[int] = []
        for (name, number), (most, what) in zip(asked.items(), there, strict=True):
            if number is not None and not 1 <= number <= most:
                raise ArgumentError(f"{name} is {number}, but the teacher has {what}; expected 1 to {most}.")
            sizes.append(most if number is None else number)
        layers, heads, neurons, rank = sizes
        return replace(self, layers=layers, heads=heads, neurons=neurons, rank=rank)


def _cut(
    source: PreTrainedModel, parts: EncoderParts, before: _Sizes, after: _Sizes, importance: Importance | None, faithful: Faithful | None
) -> PreTrainedModel:
    """A student of the sizes `after` with the weights of `source`, which has the layers that stay."""
    recorded = recorded_drop(source.config)
    layers = tuple(range(1, before.layers + 1)) if recorded is None else recorded["layers"].kept
    kept: list[tuple[Tensor, Tensor]] = []
    for layer in layers:
        heads, neurons = torch.arange(before.heads), torch.arange(before.neurons)
        if importance is not None:
            heads = most_important(importance.heads[layer - 1], after.heads)
            neurons = most_important(importance.neurons[layer - 1], after.neurons)
        kept.append((heads, neurons))
    encoder: Any = source.base_model
    state = dict(source.state_dict())
    prefix = "" if encoder is source else f"{source.base_model_prefix}."
    for place, (heads, neurons) in enumerate(kept):
        units = (heads[:, None] * before.head_size + torch.arange(before.head_size)).flatten()
        layer_prefix = f"{prefix}{parts.layers}.{place}."
        for path in parts.projections:
            _keep(state, f"{layer_prefix}{path}", rows=units)
        _keep(state, f"{layer_prefix}{parts.attention_output}", columns=units)
        _keep(state, f"{layer_prefix}{parts.feed_forward_input}", rows=neurons)
        _keep(state, f"{layer_prefix}{parts.feed_forward_output}", columns=neurons)
    share = 1.0
    if after.rank != before.rank:
        share = _factorized(state, f"{prefix}{parts.word_embeddings}", after.rank, encoder.get_submodule(parts.word_embeddings))
        if source.get_output_embeddings() is not None:  # type: ignore[no-untyped-call]
            _factorized(state, parts.decoder, after.rank, source.get_submodule(parts.decoder))

    plain = not isinstance(source, Pruned) and after.heads * after.head_size == after.width == after.rank
    model_class: Any = type(source) if plain else PRUNED_CLASSES[type(source)]
    values = {name: value for name, value in source.config.to_dict().items() if name not in ("model_type", "architectures")}
    config = (type(source.config) if plain else model_class.config_class).from_dict(values)
    config.num_attention_heads = after.heads
    setattr(config, parts.intermediate_size, after.neurons)
    if not plain:
        config.attention_head_size, config.embedding_size = after.head_size, after.rank
    record_pruning(
        config,
        Pruning(
            heads=tuple(tuple(int(head) + 1 for head in heads) for heads, _ in kept),
            num_heads=before.heads,
            neurons=(after.neurons, before.neurons),
            rank=(after.rank, before.rank),
            embedding_share=share,
            num_examples=0 if importance is None else importance.num_examples,
            faithful=None if importance is None else faithful,
        ),
    )
    with torch.random.fork_rng(devices=[]):
        student: Any = model_class(config)
    if getattr(encoder, "pooler", None) is None and getattr(student.base_model, "pooler", None) is not None:
        student.base_model.pooler = None  # a class that may have one or not, as BertModel(config, add_pooling_layer=False)
    student.load_state_dict(state)
    pruned: PreTrainedModel = student.to(next(source.parameters()).device, source.dtype)
    return pruned


def _keep(state: dict[str, Tensor], name: str, *, rows: Tensor | None = None, columns: Tensor | None = None) -> None:
    """Keep so many of a linear layer's outputs (rows) or inputs (columns)."""
    weight = state[f"{name}.weight"]
    if rows is not None:
        rows = rows.to(weight.device)
        state[f"{name}.weight"], state[f"{name}.bias"] = weight[rows], state[f"{name}.bias"][rows]
    if columns is not None:
        state[f"{name}.weight"] = weight[:, columns.to(weight.device)]


def _factorized(state: dict[str, Tensor], name: str, rank: int, module: Any) -> float:
    """Put factors in the place of an embedding, or of a layer that scores words; returns the share that they reproduce."""
    factor, projection, share = factorize(embedding_matrix(module), rank)
    state[f"{name}.weight"], state[f"{name}.projection.weight"] = factor, projection
    return share
