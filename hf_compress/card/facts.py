"""What a card says of a model, read off the model, its config's records, and the trainer that made it."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import nn

from hf_compress import __version__
from hf_compress.arguments import CompressionArguments
from hf_compress.cached_teacher import CachedTeacher
from hf_compress.card.latency import machine, milliseconds_per_batch
from hf_compress.card.papers import DROPPING, LITTLE_OF_THE_TEACHER, PRUNING, Paper, papers_of, unique
from hf_compress.card.section import CardSection, complete_card, is_on_hub, named
from hf_compress.card.sizes import Size, size_before_dropping, size_of, size_of_stored, size_rows
from hf_compress.distillation import Distillation
from hf_compress.errors import ArgumentError
from hf_compress.layers.record import recorded_drop
from hf_compress.layers.stack import pretrained_model
from hf_compress.layers.strategies import describe_layers
from hf_compress.losses.recipes import DEFAULT_RECIPE
from hf_compress.several_teachers import members_of
from hf_compress.signals import SignalSource
from hf_compress.students.pruning_record import recorded_pruning
from hf_compress.students.warm_record import recorded_warm_start
from hf_compress.task_loss import with_decoder_inputs
from hf_compress.teacher import LiveTeacher

LATENCY_EXAMPLES = 8


def complete_card_of(
    trainer: Any,
    distillation: Distillation | None = None,
    compression: CompressionArguments | None = None,
    losses_given: bool = False,
    measure_latency: bool = False,
    dataset: object = None,
    scores: Mapping[str, float] | None = None,
) -> None:
    """Complete the card that a Trainer has just written; nothing is changed where its model was not compressed.

    Args:
        trainer: any Trainer; only the main process writes.
        distillation: its distillation, if it has one.
        compression: its flags.
        losses_given: the losses were given in Python, so that the flags name no recipe.
        measure_latency: time the model, and a teacher that is in memory, on a batch of its evaluation data, on this machine.
        dataset: what the card calls the data.
        scores: the teacher's own, "teacher_accuracy" and so on, where the log may not have them.

    Raises:
        ArgumentError: a time is asked for where there is nothing to measure, or where several processes share the model; all but the
            time is written then.
    """
    section = None
    if trainer.is_world_process_zero():
        section = section_of(trainer.model, distillation, compression or CompressionArguments(), losses_given=losses_given)
    if section is not None:
        known = {**_stored_scores(distillation), **(scores or {})}
        best = trainer.state.best_global_step if trainer.args.load_best_model_at_end else None
        rows = {"data": _data(trainer, dataset), "score": score_row(trainer.state.log_history, known, best), "time": ""}
        section = replace(section, rows={**section.rows, **rows, "made with": f"hf_compress {__version__}"})
        complete_card(trainer.args.output_dir, section)
    if not measure_latency:
        return
    if trainer.args.world_size > 1:  # all of them say so
        raise ArgumentError(
            f"measure_latency=True in one of {trainer.args.world_size} processes, which share the model and the machine. Load the "
            "saved model in one process, and make its card there."
        )
    if section is None:
        raise ArgumentError("measure_latency=True belongs to a compressed model's card, and nothing was compressed here.")
    complete_card(trainer.args.output_dir, replace(section, rows={**section.rows, "time": _time(trainer, distillation)}))


def section_of(
    model: nn.Module, distillation: Distillation | None, flags: CompressionArguments, *, losses_given: bool = False
) -> CardSection | None:
    """What can be said of a model without its trainer; None where nothing was dropped, pruned, fitted or distilled.

    Args:
        model: the student.
        distillation: whose losses taught it; None where none did.
        flags: of the run.
        losses_given: see `complete_card_of`.
    """
    origin = str(getattr(pretrained_model(model).config, "_name_or_path", None) or "")
    recorded, full = _recorded(model), size_before_dropping(model)
    if distillation is None and not recorded.tags:
        return None
    sources = members_of(distillation.teacher) if distillation is not None else {}
    path = flags.teacher_model_name_or_path
    if path is not None and "," in path and not Path(path).is_dir():
        path = None  # several were named: each model says what it was loaded from
    teachers = {number: _teacher(source, path) for number, source in sources.items()}
    teacher_name, teacher = teachers.get(None, ("", None))
    papers, tags = recorded.papers, recorded.tags
    rows = {"model": recorded.rows.pop("model"), "starts from": named(origin) if origin else "", **recorded.rows}
    made = f"This model is a smaller version of {named(origin) if origin else 'a transformer'}"
    if distillation is not None:
        papers += _papers(distillation, flags, losses_given)
        tags += ("distillation", "knowledge-distillation")
        if teacher is not None:
            made = f"This model is a student of {f'the teacher {named(teacher_name)}' if teacher_name else 'a teacher'}"
        elif len(teachers) > 1:
            said = [named(name) if name else "one without a name" for name, _ in teachers.values()]
            made = f"This model is a student of {len(teachers)} teachers ({', '.join(said)})"
        for number, (name, size) in teachers.items():
            if size is not None:
                which = "teacher" if number is None else f"teacher {number}"
                rows[which] = f"{named(name) + ', ' if name else ''}{size.words}{_on_disk(sources[number])}"
        rows |= _method_rows(distillation, flags, losses_given)
    bases = tuple(name for name in (origin, teacher_name) if is_on_hub(name))[:1]
    sizes = size_rows(size_of(model), teacher) if teacher is not None else size_rows(size_of(model), full, "the full model")
    return CardSection(made, {**rows, **sizes}, tags, unique(papers), bases)


def write_student_card(folder: str | Path, student: nn.Module, source: nn.Module, source_name: str) -> None:
    """Write the card of a model that was made of another and has not been trained yet, or complete the one that is there.

    Args:
        folder: where the student is.
        student, source: the models.
        source_name: where the source was loaded from.
    """
    recorded = _recorded(student)
    made = f"This model was made of {named(source_name)}, and was not trained since"
    rows = {"model": recorded.rows.pop("model"), "made of": f"{named(source_name)}, {size_of(source).words}", **recorded.rows}
    rows |= {**size_rows(size_of(student), size_of(source), "the source"), "made with": f"hf_compress {__version__}"}
    bases = (source_name,) if is_on_hub(source_name) else ()
    complete_card(folder, CardSection(made, rows, recorded.tags, unique(recorded.papers), bases))


def _recorded(model: nn.Module) -> CardSection:
    """What stands in a model's config: the layers that were kept, what was pruned, and what was fitted."""
    config = pretrained_model(model).config
    rows, tags, papers = {"model": size_of(model).words}, [], []
    if layers := _layer_row(config):
        rows["layers"] = layers
        tags.append("layer-dropping")
        papers.append(DROPPING)
    if (pruned := recorded_pruning(config)) is not None:
        heads = [len(layer) for layer in pruned.heads] or [pruned.num_heads]
        rows["pruned"] = (
            f"{max(heads)} of {pruned.num_heads} heads and {pruned.neurons[0]:,} of {pruned.neurons[1]:,} neurons in a layer, "
            f"embeddings of rank {pruned.rank[0]} of {pruned.rank[1]}"
        )
        rows["faithful"] = f"importance as in {pruned.faithful.replace('_', ' ')}" if pruned.faithful else ""
        tags.append("pruning")
        papers.append(PRUNING)
    if (fitted := recorded_warm_start(config)) is not None:
        rows["fitted"] = f"to the teacher's hidden states before training (pca), layers {fitted.layer_map}"
        tags.append("warm-start")
    return CardSection("", rows, tuple(tags), tuple(papers))


def score_row(history: list[dict[str, Any]], stored: Mapping[str, float], best_step: int | None = None) -> str:
    """The model's scores in its last evaluation, beside the teacher's own on the same data.

    Args:
        history: a trainer's `state.log_history`.
        stored: the teacher's, "teacher_accuracy" and so on; one that the history has wins.
        best_step: whose model was loaded at the end of the training; evaluations of later steps are of other models.
    """
    teacher = dict(stored)
    for line in history:
        teacher |= {key: value for key, value in line.items() if key.startswith("teacher_")}
    ended = max((number for number, line in enumerate(history) if "train_runtime" in line), default=-1)
    evaluations = [line for line in history[ended + 1 :] if any(key.startswith("eval_") for key in line)]
    evaluations = evaluations or [
        line for line in history if any(key.startswith("eval_") for key in line) and best_step in (None, line.get("step"))
    ]
    last: dict[str, Any] = evaluations[-1] if evaluations else {}
    words = []
    for key, value in last.items():
        name = key.removeprefix("eval_")
        if key == name:
            continue
        theirs = teacher.get(f"teacher_{name}")
        each = {which[1]: score for key, score in teacher.items() if (which := re.fullmatch(rf"teacher_(\d+)_{re.escape(name)}", key))}
        if theirs is not None:
            share = f", {value / theirs:.1%} of it" if theirs > 0 else ""
            words.append(f"{name} {value:.4g}, the teacher {theirs:.4g}{share}")
        elif each:
            words.append(f"{name} {value:.4g}" + "".join(f", teacher {number} {score:.4g}" for number, score in each.items()))
    return "; ".join(words)


def _layer_row(config: Any) -> str:
    """As in "kept 1-4 and 9-12 of 12, dropped 5-8 (symmetric)"."""
    words = []
    for name, stack in (recorded_drop(config) or {}).items():
        request = dict(stack.request)
        when = f", one after every {request['every_n_epochs']} epochs of training" if request.get("every_n_epochs") else ""
        when = f", after {request['after_epochs']} epochs of training" if request.get("after_epochs") else when
        how = f" ({request['strategy']}{when})" if "strategy" in request else when
        where = "" if name == "layers" else f"{name}: "
        words.append(f"{where}kept {describe_layers(stack.kept)} of {stack.num_layers}, dropped {describe_layers(stack.dropped)}{how}")
    return "; ".join(words)


def _teacher(source: SignalSource, path: str | None) -> tuple[str, Size | None]:
    """Its name, "" where it has none, and how large it is; None where that is not known."""
    if isinstance(source, CachedTeacher):
        identity = source.cache.manifest.teacher
        return "" if identity.name == identity.model_class else identity.name, size_of_stored(identity, path or identity.name)
    if isinstance(source, LiveTeacher):
        config = pretrained_model(source.model).config
        return path or str(getattr(config, "_name_or_path", None) or ""), size_of(source.model)
    return "", None


def _stored(distillation: Distillation) -> list[CachedTeacher]:
    return [source for source in members_of(distillation.teacher).values() if isinstance(source, CachedTeacher)]


def _recipe(distillation: Distillation, flags: CompressionArguments, losses_given: bool) -> str | None:
    if losses_given:
        return None
    stored = next((source.cache.manifest.distillation for source in _stored(distillation)), {})
    return str(flags.recipe or stored.get("distill_recipe") or DEFAULT_RECIPE)


def _papers(distillation: Distillation, flags: CompressionArguments, losses_given: bool) -> tuple[Paper, ...]:
    papers = papers_of(_recipe(distillation, flags, losses_given), [loss.name for loss in distillation.losses])
    return (*papers, LITTLE_OF_THE_TEACHER) if _stored(distillation) else papers


def _method_rows(distillation: Distillation, flags: CompressionArguments, losses_given: bool) -> dict[str, str]:
    recipe = _recipe(distillation, flags, losses_given)
    return {
        "recipe": recipe or "losses given one by one",
        "losses": "\n".join(str(loss) for loss in distillation.losses),
        "phases": ", ".join(f"{phase.name} {phase.epochs:g} epochs" for phase in flags.phases)
        + (", one layer after another in the first" if flags.distill_progressive else ""),
    }


def _on_disk(source: SignalSource) -> str:
    if not isinstance(source, CachedTeacher):
        return ""
    manifest = source.cache.manifest
    codec = f", {manifest.selection['codec']}" if manifest.selection.get("codec") else ""
    return f"; from disk, hidden states {source.cache.selection.describe()}{codec}, {manifest.bytes / 1e6:,.1f} MB"


def _stored_scores(distillation: Distillation | None) -> dict[str, float]:
    source = distillation.teacher if distillation is not None else None  # several say each its own in the log
    return dict(source.cache.manifest.teacher.scores) if isinstance(source, CachedTeacher) else {}


def _data(trainer: Any, dataset: object) -> str:
    data = trainer.train_dataset
    names = [dataset] if isinstance(dataset, str) else list(dataset) if isinstance(dataset, (list, tuple)) else []
    count = f"{len(data):,} training examples" if data is not None and hasattr(data, "__len__") else ""
    return ", ".join([*([count] if count else []), *map(str, names)])


def _time(trainer: Any, distillation: Distillation | None) -> str:
    """The student's, and the teacher's where it is in memory, over a batch of the evaluation data."""
    data = trainer.eval_dataset if trainer.eval_dataset is not None else trainer.train_dataset
    data = next(iter(data.values())) if isinstance(data, dict) else data
    if data is None:
        raise ArgumentError("measure_latency=True needs examples, and the Trainer has neither eval_dataset nor train_dataset.")
    with torch.random.fork_rng(devices=[]):
        batch, *_ = trainer.get_eval_dataloader(list(islice(data, LATENCY_EXAMPLES)))  # to its end, as accelerate counts on
    batch = with_decoder_inputs(trainer.model, trainer._prepare_inputs(dict(batch)))
    labels = {"labels", "label", "label_ids", *trainer.label_names}
    tensors = {name: value for name, value in batch.items() if isinstance(value, torch.Tensor) and name not in labels}
    models = {"student": trainer.model}
    if distillation is not None and isinstance(distillation.teacher, LiveTeacher):
        models["teacher"] = distillation.teacher.model
    times = milliseconds_per_batch(models, tensors)
    first = tensors[pretrained_model(trainer.model).main_input_name]
    size = " x ".join(str(number) for number in first.shape[:2])
    words = [f"{times['student']:.3g} ms for a batch of {size}"]
    if "teacher" in times:
        words.append(f"the teacher {times['teacher']:.3g} ms, {times['teacher'] / times['student']:.1f} times as long")
    return f"{', '.join(words)}; on {machine(trainer.args.device)}"
