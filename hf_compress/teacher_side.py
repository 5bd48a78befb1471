"""The teacher's side of a run: who answers, of what shape, and which losses go with it. Live, or from disk; the trainer takes either."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from safetensors.torch import load_file
from torch import nn
from transformers import AutoTokenizer, PreTrainedModel

from hf_compress.arguments import LOSS_FLAGS, CompressionArguments
from hf_compress.cache.manifest import Manifest, refuse_mismatch
from hf_compress.cache.reader import TeacherCache
from hf_compress.cache.select import keeps_whole_states
from hf_compress.cache.selection import Selection
from hf_compress.cached_teacher import CachedTeacher
from hf_compress.errors import ArgumentError, CacheError, LossError, TeacherError
from hf_compress.layers.layer_map import LayerMap
from hf_compress.layers.stack import pretrained_model, unwrap
from hf_compress.losses.attention_scores import AttentionScoresLoss
from hf_compress.losses.hidden_states import EmbeddingsLoss, HiddenStatesLoss
from hf_compress.losses.logits import LogitsLoss
from hf_compress.losses.loss import Loss
from hf_compress.losses.recipes import DEFAULT_RECIPE, losses_of
from hf_compress.signals import SignalSource, SignalSpec
from hf_compress.task import ModelShape, kind_of
from hf_compress.teacher import LiveTeacher, load_teacher
from hf_compress.teacher_checks import check_vocabularies, label_order, labels_of
from hf_compress.teacher_identity import had_head, refuse_several_stacks, shape_of, tokenizer_hash, weights_hash
from hf_compress.teacher_placement import check_sharding, refuse_split

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class TeacherSide:
    """Who answers, and what is compared.

    Attributes:
        source: None where no loss needs a teacher.
        shape: the teacher's; None without one.
        losses: not resolved yet.
    """

    source: SignalSource | None
    shape: ModelShape | None
    losses: Sequence[Loss]


def teacher_at(path: str, student: nn.Module, flags: CompressionArguments, losses: Sequence[Loss] | None) -> PreTrainedModel:
    """Load the teacher of a run, with the head that its losses read.

    Args:
        path: where it is.
        student, flags, losses: as for `live_side`.

    Raises:
        TeacherError: see `load_teacher`.
        ArgumentError: it is to be split up, and this run cannot do that.
    """
    chosen = losses if losses is not None else recipe_of(flags, {})
    check_sharding(bool(flags.teacher_sharded), goes_to_disk=flags.teacher_cache_dir is not None)
    reads = any(loss.weight and loss.needs_teacher and loss.phase == "prediction" for loss in chosen)
    return load_teacher(
        path,
        kind_of(student),
        revision=flags.teacher_revision,
        dtype=flags.teacher_dtype,
        needs_logits=reads,
        sharded=bool(flags.teacher_sharded),
    )


def live_side(
    student: nn.Module,
    model: nn.Module | None,
    path: str | None,
    flags: CompressionArguments,
    losses: Sequence[Loss] | None,
    tokenizer: Any,
) -> TeacherSide:
    """A model beside the student.

    Args:
        student: the student.
        model: the teacher; None for losses that need none.
        path: where the teacher was loaded from, None if it was handed over.
        flags: the run's.
        losses: those given in Python; None for the recipe of the flags.
        tokenizer: the student's.

    Raises:
        TeacherError, ArgumentError, LossError: if the two do not fit.
    """
    chosen = list(losses) if losses is not None else recipe_of(flags, {})
    if model is None:
        return TeacherSide(None, None, chosen)
    if model is student or unwrap(model) is unwrap(student):
        raise TeacherError("Teacher and student are the same model object. Load the teacher a second time, or copy.deepcopy it.")
    if flags.teacher_cache_dir is not None:
        refuse_split(model)
    saved = path is not None and os.path.isfile(os.path.join(path, "tokenizer_config.json"))
    check_vocabularies(student, model, tokenizer, AutoTokenizer.from_pretrained(path) if saved and path is not None else None)
    order = label_order(student, labels_of(model)) if _compare_logits(chosen) else None
    shape = ModelShape.of(model)
    if flags.teacher_cache_dir is not None:
        refuse_several_stacks(shape)
    # What a budget leaves of the hidden states is chosen later; it is a selection in any case.
    selection = flags.selection if flags.teacher_cache_budget is None else Selection.everything()
    _refuse_void_selection(flags, chosen, ModelShape.of(student), shape)
    if selection is not None:
        signals_within(student, model, flags, losses, selection)  # a loss that needs the states whole says so before they are stored
        chosen = with_selection(chosen, selection, ModelShape.of(student), shape)
    if flags.teacher_cache_logits_top_k is not None:
        shape = _with_top_logits(shape, chosen, flags.teacher_cache_logits_top_k)  # losses that need all of them say so
    return TeacherSide(LiveTeacher(model, label_order=order), shape, chosen)


def cached_side(
    student: nn.Module,
    flags: CompressionArguments,
    losses: Sequence[Loss] | None,
    tokenizer: Any,
    teacher: nn.Module | None,
    device: torch.device,
    *,
    known: bool = False,
) -> TeacherSide:
    """A finished cache; no teacher is loaded.

    Args:
        student, flags, losses, tokenizer: as for `live_side`; recipe, layer map and selection that are not given are the cache's.
        teacher: a model that was handed over, which the cache must be of.
        device: where the student is.
        known: the run has read this cache before, for another student, and seen that it is of its teacher.

    Raises:
        CacheError: if the cache is another teacher's or tokenizer's, or does not hold what the losses need.
    """
    assert flags.teacher_cache_dir is not None
    refuse_split(teacher)
    cache = TeacherCache(flags.teacher_cache_dir, selection=flags.selection)
    manifest = cache.manifest
    if flags.teacher_cache_logits_top_k is not None:
        cache.keep_top(flags.teacher_cache_logits_top_k)
    if flags.teacher_cache_dtype is not None:
        refuse_mismatch(manifest, {"selection.codec": flags.codec}, "in another folder (--teacher_cache_dir), with the teacher")
    if not known:
        _refuse_other_teacher(manifest, flags, teacher, kind_of(student))
    _refuse_other_tokenizer(manifest, student, tokenizer)
    _refuse_fewer_layers(cache, flags)
    chosen = list(losses) if losses is not None else recipe_of(flags, manifest.distillation)
    shape = shape_of(manifest, cache.selection)
    _refuse_void_selection(flags, chosen, ModelShape.of(student), shape)
    if manifest.distillation.get("selected") or flags.selection is not None:
        chosen = with_selection(chosen, cache.selection, ModelShape.of(student), shape)
    if _compare_logits(chosen):
        cache.put_labels_in_order(label_order(student, list(manifest.teacher.labels)))
    pad, eos = getattr(tokenizer, "pad_token_id", None), getattr(tokenizer, "eos_token_id", None)
    logger.info(
        "teacher on disk: %s, %d examples of %s, hidden states %s",
        flags.teacher_cache_dir,
        len(cache),
        manifest.teacher.name,
        cache.selection.describe(),
    )
    return TeacherSide(CachedTeacher(cache, pad_token_id=pad if pad != eos else None, device=device), shape, chosen)


def _refuse_void_selection(flags: CompressionArguments, losses: Sequence[Loss], student: ModelShape, teacher: ModelShape) -> None:
    """Raise ArgumentError if part of the hidden states is asked for, and no loss compares any."""
    if flags.selection in (None, Selection.everything()):
        return
    seen = [loss for loss in losses if loss.weight]
    if not any(part.teacher_spec().hidden_states for loss in seen for part in loss.resolve(student, teacher)):
        raise ArgumentError(
            f"--hidden_states_selection {flags.hidden_states_selection} would have no effect: the losses are "
            f"{', '.join(loss.name for loss in seen)}, and none of them compares hidden states. Leave it out, or take a recipe that does "
            "(mud, layerwise, tinybert)."
        )


def with_selection(losses: Sequence[Loss], selection: Selection, student: ModelShape, teacher: ModelShape) -> list[Loss]:
    """The losses that a selection of hidden states leaves: the layers that it names, and no attention that is not asked for by name.

    Raises:
        LossError: for models with several stacks of layers.
    """
    depth = selection.depth
    chosen: list[Loss] = []
    for loss in losses:
        if isinstance(loss, AttentionScoresLoss) and not loss.required:
            logger.info("attention scores are left out: a selection of the hidden states is compared (%s)", selection)
            continue
        every_layer = depth.layers is None and depth.scheme is None and depth.pairs is None
        if loss.whole_states and not every_layer:
            raise LossError(
                f"--hidden_states_selection {selection} chooses layers, and {loss.name} has a rule of its own for that. Leave it out, "
                "or take a recipe that follows it (mud, layerwise, tinybert)."
            )
        if isinstance(loss, HiddenStatesLoss) and not every_layer:
            if type(loss) is EmbeddingsLoss:
                continue  # layer 0 is one of the layers that the selection chooses from
            if len(student.stacks) != 1:
                raise LossError(
                    f"--hidden_states_selection {selection} chooses layers of one stack, and the student has {', '.join(student.stacks)}."
                )
            (name,) = student.stacks
            own = student.stacks[name].map_from(loss.layer_map, teacher.stacks[name])
            pairs = depth.layer_map_pairs(student.stacks[name].num_layers, teacher.stacks[name].num_layers, own.pairs)
            loss = replace(loss, layer_map=LayerMap(pairs))
        chosen.append(loss)
    return chosen


def signals_within(
    student: nn.Module, teacher: nn.Module, flags: CompressionArguments, losses: Sequence[Loss] | None, selection: Selection
) -> SignalSpec:
    """What the losses ask of a teacher on disk that holds a selection of its hidden states.

    Args:
        student, teacher: the models.
        flags, losses: as for `live_side`.
        selection: what it holds.

    Raises:
        LossError: a loss cannot learn from part of the hidden states.
        ArgumentError: the selection has more layers than are compared.
    """
    chosen = list(losses) if losses is not None else recipe_of(flags, {})
    # Attention that is not asked for by name goes with any selection; `live_side` has said so.
    chosen = [loss for loss in chosen if not isinstance(loss, AttentionScoresLoss) or loss.required]
    ours, theirs = ModelShape.of(student), ModelShape.of(teacher)
    part = not keeps_whole_states(selection)
    stored = replace(theirs, stacks={name: replace(stack, selected=part) for name, stack in theirs.stacks.items()})
    spec = SignalSpec()
    for loss in with_selection(chosen, selection, ours, theirs):
        for resolved in loss.resolve(ours, stored) if loss.weight else ():
            spec |= resolved.teacher_spec()
    return spec


def no_teacher(cache_dir: str | None) -> str:
    """What to say where there is nobody to learn from."""
    if cache_dir is not None:
        return (
            f"There is no finished teacher on disk in {cache_dir}, and no teacher to build it from: add --teacher_model_name_or_path with "
            "the fine-tuned model, or name the folder of a finished cache (one with a manifest.json), or one on the Hugging Face hub "
            "(hf://datasets/USER/NAME)."
        )
    return (
        "DistillTrainer has no teacher: give --teacher_model_name_or_path a fine-tuned model, or DistillTrainer(teacher=model). "
        "To drop layers without distilling, leave --trainer_class out."
    )


def recipe_settings(flags: CompressionArguments, losses_given: bool) -> dict[str, Any]:
    """What a manifest keeps of the flags, so that a later run need not repeat them."""
    kept = {} if losses_given else {name: getattr(flags, name) for name in LOSS_FLAGS if getattr(flags, name) is not None}
    return {**kept, "selected": flags.selection is not None}


def recipe_of(flags: CompressionArguments, stored: Mapping[str, Any]) -> list[Loss]:
    """The losses of a run's flags; what the flags do not say, a teacher on disk of the same recipe does.

    Args:
        flags: the run's.
        stored: `distillation` of a manifest; empty without one.
    """
    given = {name: getattr(flags, name) for name in LOSS_FLAGS}
    if flags.distill_recipe is None or flags.distill_recipe == stored.get("distill_recipe", DEFAULT_RECIPE):
        given = {name: value if value is not None else stored.get(name) for name, value in given.items()}
    settings = CompressionArguments(**given)
    return losses_of(
        settings.recipe or DEFAULT_RECIPE,
        layer_map=settings.layer_map,
        temperature=settings.distill_temperature,
        weights=settings.weights,
        final_weights=settings.final_weights,
        skip_heads=settings.distill_skip_heads,
        relation_heads=settings.distill_relation_heads,
    )


def _with_top_logits(teacher: ModelShape, losses: Sequence[Loss], k: int) -> ModelShape:
    """The shape of a teacher that will have the k largest logits of each token on disk."""
    if teacher.kind not in ("causal_lm", "masked_lm") or not _compare_logits(losses):
        found = f"the teacher is a {teacher.name}" if _compare_logits(losses) else "no loss compares logits"
        raise ArgumentError(
            f"--teacher_cache_logits_top_k {k} is about the logits of a causal or masked language model, and {found}: leave it out."
        )
    return replace(teacher, top_logits=k)


def _compare_logits(losses: Sequence[Loss]) -> bool:
    return any(isinstance(loss, LogitsLoss) and loss.weight for loss in losses)


def _refuse_other_teacher(manifest: Manifest, flags: CompressionArguments, teacher: nn.Module | None, kind: Any) -> None:
    """A teacher named beside the cache must be the one it was built from; its file is hashed, and loaded only if need be."""
    path = flags.teacher_model_name_or_path
    if teacher is None and path is None:
        return
    if teacher is None:
        assert path is not None
        file = os.path.join(path, "model.safetensors")
        if os.path.isfile(file) and weights_hash(load_file(file).items()) == manifest.teacher.weights:
            return
        with_head = had_head(manifest)
        teacher = load_teacher(path, kind, revision=flags.teacher_revision, dtype=flags.teacher_dtype, needs_logits=with_head)
    command = (
        f"name another folder with --teacher_cache_dir. Or keep it, and name the teacher that it is of ({manifest.teacher.name}), or none."
    )
    refuse_mismatch(manifest, {"teacher.weights": weights_hash(teacher.state_dict().items())}, command)


def _refuse_fewer_layers(cache: TeacherCache, flags: CompressionArguments) -> None:
    """Layers that are to be stored must be there: a finished cache gets no more of them."""
    held = {key.layer for key in cache.spec.hidden_states}
    absent = flags.stored_layers(max(size["num_layers"] for size in cache.manifest.teacher.stacks.values())) - held
    if absent:
        raise CacheError(
            f"The teacher on disk in {cache.folder} is finished, and does not hold the layers {', '.join(map(str, sorted(absent)))} of "
            "--teacher_cache_layers. Build another: name another folder with --teacher_cache_dir, and the teacher."
        )


def _refuse_other_tokenizer(manifest: Manifest, student: nn.Module, tokenizer: Any) -> None:
    found = tokenizer_hash(tokenizer)
    if found and manifest.tokenizer:
        refuse_mismatch(manifest, {"tokenizer": found}, "name another folder with --teacher_cache_dir, and the teacher")
    size = getattr(pretrained_model(student).config.get_text_config(), "vocab_size", None)
    if size is not None and manifest.teacher.vocab_size not in (0, size):
        raise TeacherError(
            f"Student and teacher have other vocabularies: {size} and {manifest.teacher.vocab_size} tokens. Take a student that was made "
            f"from {manifest.teacher.name}, or a cache of a teacher with the student's tokenizer."
        )
