"""A narrow student that starts where its teacher is, so that it needs no general distillation: closed form, on a sample of text.

    teacher's hidden states -> one basis U of the student's width (pca_basis)
    embeddings, layer 1, layer 2, ...: each fitted to U^T (h_T - mean) from what the student itself has by then (warm_layer)
    the head, from the student's last states to the teacher's answers
    the projection back, student's width -> teacher's width, from which `HiddenStatesLoss` and `EmbeddingsLoss` go on learning

SliceGPT (Ashkboos et al. 2401.15024) rotates the weights and cuts them off. That is exact before a norm without gain; BERT's layers end in
a LayerNorm with one, and a student has fewer layers too. So each linear map is fitted by ridge regression to what the teacher's
computes, in the order of the forward: what one map gets wrong, the next one sees and corrects.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm
from transformers import PreTrainedConfig, PreTrainedModel

from hf_compress.errors import ArgumentError, TeacherError
from hf_compress.layers.layer_map import LayerMap
from hf_compress.layers.stack import find_stacks
from hf_compress.losses.loss import Projection
from hf_compress.projection_file import shared_projection
from hf_compress.projections import Projections
from hf_compress.students.least_squares import Ridge, fit_residual
from hf_compress.students.pca_basis import PcaBasis, pca_basis
from hf_compress.students.replay import Sample, Side, evaluating, read_sample, replay, run
from hf_compress.students.warm_head import fit_head, head_watch
from hf_compress.students.warm_layer import TeacherLayer, fit_layer, narrowed_input, norm_in
from hf_compress.students.warm_parts import head_of, warm_parts_of
from hf_compress.students.warm_record import WarmStartRecord, describe_warm_start, record_warm_start

logger = logging.getLogger(__name__)

MAX_TOKENS = 16384
"""Tokens of the sample: about 300 pairs of sentences."""
_TOKENS_A_DIMENSION = 2


def warm_start(
    student: PreTrainedModel, teacher: PreTrainedModel, examples: Iterable[Mapping[str, Any]], *, max_tokens: int = MAX_TOKENS
) -> WarmStartRecord:
    """Give a student of the teacher's architecture and of another width weights that compute nearly what the teacher computes.

    The projection becomes part of the student, where a `DistillTrainer` finds it, and the config records how near the student comes.

    Args:
        student: with as many heads as the teacher; its weights are replaced, on the teacher's device and in float32.
        teacher: BERT, RoBERTa or DistilBERT; it stays as it is.
        examples: dicts of tensors (batch, tokens), as the teacher takes them; labels are not read.
        max_tokens: of the sample.

    Returns:
        What stands in the config too.

    Raises:
        DataError: too few examples.
        TeacherError: another architecture, or hidden states that are not finite.
    """
    parts, norms = warm_parts_of(teacher)
    width, hidden_size = (len(norm_in(model.base_model, norms.embeddings).weight) for model in (teacher, student))
    sample = read_sample(teacher, examples, max_tokens=max_tokens, min_tokens=_TOKENS_A_DIMENSION * width)
    moved: nn.Module = student
    moved.to(next(teacher.parameters()).device).float()
    (theirs,), (ours,) = (find_stacks(model).values() for model in (teacher, student))
    layer_map = LayerMap.uniform(ours.depth, theirs.depth)
    head = head_of(teacher)
    with evaluating(teacher, student), tqdm(total=ours.depth + 2, desc="warm start", unit="layer") as bar:
        watch: dict[str, tuple[str, Side]] = {**head_watch(head), "embedded": (f"{_prefix(teacher)}{norms.embeddings}", "in")}
        shown = run(teacher, theirs.module(1), sample, watch)
        compared = (0, *layer_map.teacher_layers)
        targets = {layer: sample.flat(shown.states[layer]) for layer in compared}
        for layer, target in targets.items():
            if not bool(target.isfinite().all()):
                raise TeacherError(f"The teacher's hidden states are not finite after layer {layer}: there is nothing to fit a student to.")
        basis = pca_basis((target[sample.fitted] for target in targets.values()), hidden_size)
        features = sample.flat(shown.noted["embedded"])
        _fit_embeddings(teacher.base_model, student.base_model, norms.embeddings, features, basis, targets[0], sample)
        bar.update()
        own_calls = run(student, ours.module(1), sample, {}).calls
        own = list(own_calls.hidden_states)
        reached = [sample.flat(own)]
        for layer, teacher_layer in layer_map:
            first = compared[layer - 1] + 1
            covered = [TeacherLayer(theirs.module(each), shown.states[each - 1]) for each in range(first, teacher_layer + 1)]
            fit_layer(ours.module(layer), own_calls, own, covered, shown.calls, targets[teacher_layer], basis, sample, parts, norms)
            own, _ = replay(ours.module(layer), own_calls, own, sample, {})
            reached.append(sample.flat(own))
            bar.update()
        if head is not None:
            fit_head(head, teacher, shown.noted, student, ours.module(1), sample)
        bar.update()
    projection = Ridge(torch.cat(reached), sample.fitted.repeat(len(reached))).fit(torch.cat([targets[layer] for layer in compared]))
    held_out = ~sample.fitted
    errors = tuple(_missed(projection(state[held_out]), targets[of][held_out]) for state, of in zip(reached, compared, strict=True))
    name = shared_projection(theirs.name)
    attached = Projections.attach(student, {name: Projection(hidden_size, width)}, teacher=str(teacher.config.model_type))
    attached.load_state_dict({f"{name}.weight": projection.weight, f"{name}.bias": projection.bias})
    record = WarmStartRecord(str(layer_map), errors, len(sample.fitted), head is not None or teacher.base_model is teacher)
    record_warm_start(student.config, record)
    logger.info("%s", describe_warm_start(record))
    return record


def check_warm_start(teacher: PreTrainedModel, config: PreTrainedConfig) -> None:
    """Refuse, before any work, what a warm start cannot make.

    Args:
        teacher: what is to be fitted to.
        config: the student's.

    Raises:
        ArgumentError: not narrower than the teacher, or another number of heads.
        TeacherError: another architecture.
    """
    parts, norms = warm_parts_of(teacher)
    width = len(norm_in(teacher.base_model, norms.embeddings).weight)
    heads, hidden_size = getattr(teacher.config, parts.heads), config.hidden_size
    if hidden_size >= width:
        raise ArgumentError(
            f"hidden_size is {hidden_size} and the teacher's {width}: a warm start makes narrower students. At the teacher's own width its "
            "layers keep their weights: give layers_to_keep, or num_hidden_layers alone."
        )
    if getattr(config, parts.heads) != heads:
        raise ArgumentError(
            f"num_attention_heads is {getattr(config, parts.heads)} and the teacher's {heads}: with init='pca' each head starts as one of "
            "the teacher's. Leave num_attention_heads out, and choose a hidden_size that they divide."
        )


def _fit_embeddings(
    teacher: nn.Module, student: nn.Module, norm: str, features: Tensor, basis: PcaBasis, targets: Tensor, sample: Sample
) -> None:
    """One linear map takes all of the teacher's tables, words, positions and types, to the student's."""
    theirs, ours = _embedding_tables(teacher), _embedding_tables(student)
    their_norm, our_norm = (norm_in(model, norm) for model in (teacher, student))
    fit = fit_residual(
        Ridge(features, sample.fitted), our_norm, 0.0, narrowed_input(basis, their_norm, features), basis.narrowed(targets), sample.fitted
    )
    for name, table in theirs.items():
        ours[name].weight.copy_(table.weight.float() @ fit.weight.T)
    ours["position_embeddings"].weight.add_(fit.bias)  # each token has one position


def _prefix(model: PreTrainedModel) -> str:
    """What stands before the path of a module of the encoder."""
    return "" if model.base_model is model else f"{model.base_model_prefix}."


def _embedding_tables(encoder: nn.Module) -> dict[str, nn.Embedding]:
    embeddings = encoder.get_submodule("embeddings")
    return {name: table for name, table in embeddings.named_children() if isinstance(table, nn.Embedding)}


def _missed(given: Tensor, wanted: Tensor) -> float:
    """The part of the variance that is missed."""
    return float((given - wanted).square().sum() / (wanted - wanted.mean(0)).square().sum().clamp_min(1e-30))
