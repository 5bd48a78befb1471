"""Drop layers from a model, in place.

    request -> stacks -> (contribution: measure) -> which layers -> check that the result could be reloaded
                                                                       |
                          record in the config <- change configs <- change the model

Everything that can go wrong is found before the first change. Survivors keep their weights; the output of the layer before a
gap feeds the layer after it (Sajjad et al., arXiv 2004.03844).
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from hf_compress.errors import LayerDropError
from hf_compress.layers.contribution import choose_by_contribution, measure_contribution
from hf_compress.layers.peft import check_adapters, forget_base, renumber_adapters
from hf_compress.layers.rebuild import check_rebuild, config_edits, first_layer_must_stay
from hf_compress.layers.record import KeptLayers, record_drop, recorded_drop
from hf_compress.layers.request import DropRequest
from hf_compress.layers.stack import LayerStack, find_stacks, pretrained_model
from hf_compress.layers.strategies import LayerDropStrategy, describe_layers

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class StackDrop:
    """What goes and what stays of one stack; layers are counted from 1 in the full model of `num_layers`.

    similarities: for contribution, the mean cosine of each layer's input and output, layer 1 first; else None.
    """

    kept: tuple[int, ...]
    dropped: tuple[int, ...]
    num_layers: int
    similarities: tuple[float, ...] | None = None

    def __str__(self) -> str:
        return f"kept {describe_layers(self.kept)} of {self.num_layers}, dropped {describe_layers(self.dropped)}"


@dataclass(frozen=True)
class LayerDrop:
    """What `drop_layers` did: by stack, and whether the model had it done already (then nothing was changed)."""

    stacks: dict[str, StackDrop]
    request: DropRequest
    already_done: bool = False

    @property
    def strategy(self) -> LayerDropStrategy | None:
        """The strategy that chose the layers; None if they were named."""
        return self.request.strategy

    def __str__(self) -> str:
        if list(self.stacks) == ["layers"]:
            return str(self.stacks["layers"])
        return "; ".join(f"{name}: {stack}" for name, stack in self.stacks.items())


def drop_layers(
    model: nn.Module,
    *,
    strategy: LayerDropStrategy | None = None,
    num_layers_to_drop: int | None = None,
    layers_to_drop: Sequence[int] | None = None,
    layers_to_keep: Sequence[int] | None = None,
    threshold: float | None = None,
    stack: str | None = None,
    batches: Iterable[Mapping[str, Any]] | None = None,
) -> LayerDrop:
    """Drop layers from `model`, in place, and record in its config what was kept.

    Layers are counted from 1. Give a strategy (by default it drops a third of the layers, rounded down, at least 1), or the
    layers to drop, or those to keep. In encoder-decoders both stacks are cut alike unless `stack` is "encoder" or "decoder".
    `strategy="contribution"` measures on `batches` (dicts of tensors as the model takes them; the first 512 examples count)
    and drops the `num_layers_to_drop` layers that change the summary token least, or those above `threshold` (by default
    0.95) in cosine similarity.

    The model may be wrapped by PEFT: its base is cut. (Then save that base with `layers.peft.save_dropped_base`.) The same
    request on a model that records it changes nothing.

    Raises LayerDropError, with the model as it was, if the request is wrong or another drop is recorded, or if the model
    could not be saved and loaded again to the same outputs.

        >>> drop_layers(model, strategy="symmetric", num_layers_to_drop=4)  # of 12: kept 1-4 and 9-12, dropped 5-8
    """
    if not isinstance(model, nn.Module):
        raise LayerDropError(
            f"drop_layers takes a model, and found {model!r}: load it first (AutoModelForSequenceClassification.from_pretrained). "
            "`hf-compress drop MODEL -o DIR` does it from folder to folder."
        )
    request = DropRequest.of(
        strategy,
        num_layers_to_drop=num_layers_to_drop,
        layers_to_drop=layers_to_drop,
        layers_to_keep=layers_to_keep,
        threshold=threshold,
        stack=stack,
    )
    drop = plan_drop(model, request, batches)
    apply_drop(model, drop)
    return drop


def plan_drop(
    model: nn.Module,
    request: DropRequest,
    batches: Iterable[Mapping[str, Any]] | None = None,
    chosen_before: Mapping[str, KeptLayers] | None = None,
) -> LayerDrop:
    """What `request` means for `model`, checked in full; nothing is changed.

    `chosen_before` is what a checkpoint records, which is then taken instead of choosing anew. Raises LayerDropError, also
    if the checkpoint records something else than the request asks for.
    """
    owner = pretrained_model(model)
    stacks = _chosen_stacks(find_stacks(model), request, type(owner).__name__)
    recorded = recorded_drop(owner.config) or {}
    if any(name in recorded for name in stacks):
        return _planned_before(stacks, recorded, request)
    chosen = _chosen_before(stacks, request, chosen_before) if chosen_before else _choose(model, stacks, request, batches)
    kept = {
        name: (stack, tuple(layer for layer in range(1, stack.depth + 1) if layer not in chosen[name][0])) for name, stack in stacks.items()
    }
    check_rebuild(owner, kept)
    check_adapters(model, kept)
    planned = {
        name: StackDrop(kept[name][1], dropped, stacks[name].depth, similarities) for name, (dropped, similarities) in chosen.items()
    }
    return LayerDrop(planned, request)


def apply_drop(model: nn.Module, drop: LayerDrop) -> None:
    """Do what `plan_drop` planned for this model, record it in the config, and log it."""
    if drop.already_done:
        logger.info("The model's config records this drop already: %s. Nothing is changed.", drop)
        return
    take_out(model, {name: stack.dropped for name, stack in drop.stacks.items()})
    written = drop.request.written()
    forget_base(model)
    owner = pretrained_model(model)
    owner.add_model_tags(["hf_compress", "layer-dropping"])  # of its card on the hub, whoever pushes it
    record_drop(owner.config, {name: KeptLayers(stack.kept, stack.num_layers, written) for name, stack in drop.stacks.items()})
    logger.info("%s", drop)


def take_out(model: nn.Module, layers: Mapping[str, tuple[int, ...]]) -> None:
    """Take layers, counted from 1 in each stack as it is now, out of the model and its config; nothing is checked or recorded."""
    stacks = find_stacks(model)
    kept = {
        name: (stacks[name], tuple(layer for layer in range(1, stacks[name].depth + 1) if layer not in dropped))
        for name, dropped in layers.items()
    }
    renumber_adapters(model, kept)
    for name, (stack, left) in kept.items():
        edits = config_edits(stack, left)
        stack.remove(layers[name])
        for edit in edits:
            edit.apply()


def dropped_parameters(model: nn.Module, drop: LayerDrop) -> set[nn.Parameter]:
    """The parameters that `drop`, planned and not yet applied, takes out of the model."""
    if drop.already_done:
        return set()
    stacks = find_stacks(model)
    gone: set[nn.Parameter] = set()
    for name, stack_drop in drop.stacks.items():
        if not stacks[name].shared:
            for layer in stack_drop.dropped:
                gone.update(stacks[name].module(layer).parameters())
    return gone


def _chosen_stacks(stacks: dict[str, LayerStack], request: DropRequest, model: str) -> dict[str, LayerStack]:
    if request.stack is None:
        return stacks
    if request.stack not in stacks:
        raise LayerDropError(
            f"stack is {request.stack!r}, but {model} has {' and '.join(map(repr, stacks))}: choose one of them, or leave it out."
        )
    return {request.stack: stacks[request.stack]}


def _planned_before(stacks: dict[str, LayerStack], recorded: dict[str, KeptLayers], request: DropRequest) -> LayerDrop:
    if all(name in recorded and request.matches(recorded[name]) for name in stacks):
        done = {name: StackDrop(recorded[name].kept, recorded[name].dropped, recorded[name].num_layers) for name in stacks}
        return LayerDrop(done, request, already_done=True)
    was = "; ".join(
        ("" if name == "layers" else f"{name}: ") + f"kept {describe_layers(kept.kept)} of {kept.num_layers}"
        for name, kept in recorded.items()
    )
    raise LayerDropError(
        f"This model has had layers dropped already ({was}), and another drop is asked for ({request}). "
        "Start from the full model, or ask for the same layers, or leave the request out to use the model as it is."
    )


Chosen = dict[str, tuple[tuple[int, ...], tuple[float, ...] | None]]
"""For each stack the layers to drop, and the similarities if they were measured."""


def _chosen_before(stacks: dict[str, LayerStack], request: DropRequest, recorded: Mapping[str, KeptLayers]) -> Chosen:
    for name, stack in stacks.items():
        if name not in recorded or recorded[name].num_layers != stack.depth or not request.matches(recorded[name]):
            was = f"{describe_layers(recorded[name].kept)} of {recorded[name].num_layers}" if name in recorded else "all"
            raise LayerDropError(
                f"The checkpoint to resume from kept layers {was}, and this run asks for another drop ({request}, of {stack.depth}). "
                "Ask for the same, or start anew in another output_dir."
            )
    return {name: (recorded[name].dropped, None) for name in stacks}


def _resolved(request: DropRequest, stack: LayerStack, among: int) -> tuple[int, ...]:
    try:
        return request.resolve(stack.depth)
    except LayerDropError as error:
        if among == 1:
            raise
        raise LayerDropError(f"In the {stack.name}: {error} To drop layers of one stack only, name it with `stack`.") from error


def _choose(model: nn.Module, stacks: dict[str, LayerStack], request: DropRequest, batches: Iterable[Mapping[str, Any]] | None) -> Chosen:
    if request.strategy != "contribution":
        return {name: (_resolved(request, stack, among=len(stacks)), None) for name, stack in stacks.items()}
    if batches is None:
        raise LayerDropError(
            "The strategy 'contribution' measures the layers on examples, and none were given: pass batches= to "
            "drop_layers, or examples= to "
            "LayerDropCallback (the development set serves)."
        )
    measured = measure_contribution(model, batches)
    chosen: Chosen = {}
    for name, stack in stacks.items():
        candidates = tuple(range(2 if first_layer_must_stay(pretrained_model(model), stack) else 1, stack.depth + 1))
        number, threshold = request.num_layers_to_drop, request.effective_threshold
        dropped = choose_by_contribution(measured[name], candidates, num_layers_to_drop=number, threshold=threshold)
        chosen[name] = (dropped, measured[name])
    return chosen
