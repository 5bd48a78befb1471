"""Layers that go while a model is trained: all after some epochs, or one after another (Sajjad et al., arXiv 2004.03844, section 5).

    after_epochs=3          |1|2|3|4|5|6|       trained with all layers for 3 epochs, then all that are to go go at once
    every_n_epochs=2        |1|2|3|4|5|6|       of 4 layers "top" drops layer 4 before epoch 3, layer 3 before epoch 5
                             4 4 3 3 2 2        layers in each epoch

After k drops the model is what the strategy with num_layers_to_drop=k leaves: top drops the last layer, then the one before it; symmetric
drops around the middle. Contribution is measured once, before training, as in the paper, and the layer that contributes least goes first.
Layers that were named go from the top down.

The config records the layers that are there in the numbers of the full model, and those still to go, before the first has gone. So a
checkpoint says where its run was, and a run that is resumed goes on there.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import nn

from hf_compress.errors import LayerDropError
from hf_compress.layers.drop import LayerDrop, StackDrop, plan_drop, take_out
from hf_compress.layers.rebuild import check_rebuild
from hf_compress.layers.record import KeptLayers, record_drop, recorded_layers
from hf_compress.layers.request import DropRequest
from hf_compress.layers.stack import find_stacks, pretrained_model
from hf_compress.layers.strategies import describe_layers, layers_to_drop

logger = logging.getLogger(__name__)

Record = dict[str, KeptLayers]
"""What a config records of each stack that a schedule touches."""


def plan_schedule(model: nn.Module, request: DropRequest, batches: Iterable[Mapping[str, Any]] | None = None) -> Record:
    """Which layers go, in their order, checked at every stage; nothing is changed.

    Args:
        model: the full model, or one that records this very request.
        request: what is to go, and when.
        batches: for contribution, as for `drop_layers`.

    Raises:
        LayerDropError: the request is wrong for this model, another drop is recorded, or the model could not be saved and loaded again at
            some stage.
    """
    recorded = recorded_layers(pretrained_model(model).config) or {}
    begun = {name: each for name, each in recorded.items() if each.request == request.written()}
    if begun:
        return begun
    unfinished = next((each for each in recorded.values() if each.to_drop and each.dropped), None)
    if unfinished is not None:
        raise LayerDropError(
            f"This model is in the middle of another schedule ({_asked(unfinished)}; it has layers {describe_layers(unfinished.kept)} of "
            f"{unfinished.num_layers}), and this run asks for: {request}. Ask for the same, or start from the full model."
        )
    drop = plan_drop(model, request, batches)
    if drop.already_done:
        return {name: recorded[name] for name in drop.stacks}
    planned = {
        name: KeptLayers(tuple(range(1, each.num_layers + 1)), each.num_layers, request.written(), _order(request, each))
        for name, each in drop.stacks.items()
    }
    stacks = find_stacks(model)
    for stage in list(stages(planned))[1:-1]:  # plan_drop has checked the last
        check_rebuild(pretrained_model(model), {name: (stacks[name], each.kept) for name, each in stage.items()})
    return planned


def stages(record: Record) -> Iterator[Record]:
    """The records that the model will have, one after another, beginning with this one."""
    yield record
    for epoch in range(1, last_epoch(record) + 1):
        gone = due(record, epoch)
        if gone:
            record = _without(record, gone)
            yield record


def before_its_first_drop(record: Record) -> Record:
    """The record that the model had when the schedule began; in which order the layers went that are gone is not told."""
    return {
        name: replace(each, kept=tuple(range(1, each.num_layers + 1)), to_drop=each.dropped + each.to_drop) for name, each in record.items()
    }


def due(record: Record, epochs: int) -> dict[str, tuple[int, ...]]:
    """The layers, by stack, that go now that so many epochs are over; layers are counted in the full model."""
    going = {}
    for name, each in record.items():
        asked = dict(each.request)
        if asked.get("after_epochs") is not None:
            count = len(each.to_drop) if epochs >= asked["after_epochs"] else 0
        else:
            count = epochs // asked["every_n_epochs"] - len(each.dropped) if each.to_drop else 0
        if each.to_drop[: max(0, count)]:
            going[name] = each.to_drop[: max(0, count)]
    return going


def last_epoch(record: Record) -> int:
    """After how many epochs the last layer goes; 0 where none is left to go."""
    last = 0
    for each in record.values():
        asked = dict(each.request)
        if each.to_drop:
            last = max(last, asked.get("after_epochs") or asked["every_n_epochs"] * (len(each.dropped) + len(each.to_drop)))
    return last


def drop_next(model: nn.Module, layers: Mapping[str, tuple[int, ...]], request: DropRequest) -> LayerDrop:
    """Drop layers, counted in the full model, from a model whose config records a schedule, in place, and record it.

    Survivors keep their weights. Returns what is kept and dropped of the full model now.
    """
    config = pretrained_model(model).config
    before = recorded_layers(config) or {}
    take_out(model, {name: tuple(before[name].kept.index(layer) + 1 for layer in gone) for name, gone in layers.items()})
    record_drop(config, _without({name: before[name] for name in layers}, layers))
    now = recorded_layers(config) or {}
    drop = LayerDrop({name: StackDrop(each.kept, each.dropped, each.num_layers) for name, each in now.items()}, request)
    logger.info("%s", drop)
    return drop


def stage_of_checkpoint(checkpoint: str | Path, request: DropRequest) -> Record | None:
    """What a checkpoint's config records of this schedule; None for what holds no config (adapters only, or no folder).

    Raises:
        LayerDropError: it is of a run without this schedule.
    """
    file = Path(checkpoint) / "config.json"
    if not file.is_file():
        return None
    saved = recorded_layers(json.loads(file.read_text(encoding="utf-8"))) or {}
    of_this = {name: each for name, each in saved.items() if each.request == request.written()}
    if of_this:
        return of_this
    was = _asked(next(iter(saved.values()))) if saved else "no layers to drop"
    raise LayerDropError(
        f"The checkpoint to resume from ({checkpoint}) is of a run with {was}, and this run asks for: {request}. Give this run the flags "
        "of the one that wrote it, or start anew in another output_dir."
    )


def _without(record: Record, layers: Mapping[str, tuple[int, ...]]) -> Record:
    return {
        name: replace(
            each,
            kept=tuple(layer for layer in each.kept if layer not in layers.get(name, ())),
            to_drop=tuple(layer for layer in each.to_drop if layer not in layers.get(name, ())),
        )
        for name, each in record.items()
    }


def _order(request: DropRequest, drop: StackDrop) -> tuple[int, ...]:
    """The layers that go, the first one first."""
    if drop.similarities is not None:
        similarities = drop.similarities
        return tuple(sorted(drop.dropped, key=lambda layer: (similarities[layer - 1], layer), reverse=True))
    if request.strategy is None:
        return tuple(reversed(drop.dropped))
    order: list[int] = []
    for number in range(1, len(drop.dropped) + 1):
        order += [layer for layer in layers_to_drop(request.strategy, drop.num_layers, number) if layer not in order]
    return tuple(order)


def _asked(each: KeptLayers) -> str:
    return ", ".join(f"{name}={list(value) if isinstance(value, tuple) else value}" for name, value in each.request)
