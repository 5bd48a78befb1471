"""Progressive knowledge transfer (MobileBERT 2004.02984, section 3.4): the intermediate phase, one layer after another from the bottom.

    stage 1     embeddings and layer 1 learn                            the losses of the pair 1:a
    stage 2     layer 2 learns, what lies below is frozen               the losses of the pair 2:b
    ...
    stage n     layer n learns                                          the losses of the pair n:z

Each stage has an optimizer and a schedule of its own, and an equal share of the phase's epochs. Where the layer map leaves a layer out, it
learns together with the next one above that is taught. The paper copies the embeddings from its teacher, whose shape they have; here they
learn in the first stage, unless they are frozen. Its softer way, a small learning rate below instead of none, is `slow_rate`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from hf_compress.arguments import Phase, PhaseName
from hf_compress.errors import LossError
from hf_compress.layers.layer_map import LayerMap
from hf_compress.layers.stack import find_stacks
from hf_compress.losses.loss import Loss


@dataclass(frozen=True)
class Stage:
    """A phase, or the part of one that teaches some layers.

    Attributes:
        name: of the phase.
        epochs: how long.
        layers: the student's layers that learn, the first and the last; None for all that the phase trains.
    """

    name: PhaseName
    epochs: float
    layers: tuple[int, int] | None = None

    @property
    def folder(self) -> str:
        """For the names of folders and for the log: "intermediate", "intermediate-layer-2"."""
        return self.name if self.layers is None else f"{self.name}-layer-{self.layers[1]}"


def stages_of(phases: Sequence[Phase], model: nn.Module, intermediate: Sequence[Loss], *, progressive: bool) -> tuple[Stage, ...]:
    """The stages of a run, in order.

    Args:
        phases: of the run.
        model: the student.
        intermediate: the losses of the intermediate phase, resolved; empty without one.
        progressive: whether the intermediate phase teaches one layer after another.

    Raises:
        LossError: its layers cannot be taught one by one: shared, of several stacks, or compared all at once.
    """
    stages: list[Stage] = []
    for phase in phases:
        if not progressive or phase.name != "intermediate":
            stages.append(Stage(phase.name, phase.epochs))
            continue
        _refuse_together(model, intermediate)
        taught = sorted({layer for loss in intermediate for layer in _map_of(loss).student_layers if layer > 0})
        if not taught:
            raise LossError("--distill_progressive teaches one layer after another, but no loss compares any. Add hidden_states.")
        below = [0, *taught[:-1]]
        stages += [Stage(phase.name, phase.epochs / len(taught), (low + 1, high)) for low, high in zip(below, taught, strict=True)]
    return tuple(stages)


def losses_within(losses: Sequence[Loss], layers: tuple[int, int]) -> tuple[Loss, ...]:
    """The parts of resolved losses that teach the student's layers from the first to the last of `layers`; the embeddings with layer 1."""
    first, last = layers
    within = []
    for loss in losses:
        pairs = tuple(pair for pair in _map_of(loss).pairs if first <= max(1, pair[0]) <= last)
        if pairs:
            changes: dict[str, Any] = {"layer_map": LayerMap(pairs)}
            within.append(replace(loss, **changes))
    return tuple(within)


def parameters_of(layers: tuple[int, int], model: nn.Module, head: Sequence[nn.Parameter]) -> list[nn.Parameter]:
    """What learns with the layers from the first to the last of `layers`; none where the first stands above the last.

    Args:
        layers: of a stage.
        model: the student.
        head: what the predictions alone need; what is neither that nor in a layer learns with layer 1.
    """
    first, last = layers
    (stack,) = find_stacks(model).values()
    found = [each for layer in range(first, last + 1) for each in stack.module(layer).parameters()]
    if first == 1 <= last:
        elsewhere = {id(each) for each in head} | {id(each) for module in stack.modules for each in module.parameters()}
        found += [each for each in model.parameters() if id(each) not in elsewhere]
    return found


def slow_down(optimizer: torch.optim.Optimizer, slow: Sequence[nn.Parameter], rate: float) -> None:
    """Give some parameters of a new optimizer a share of its learning rate, in groups of their own.

    Args:
        optimizer: before its first step, and before a schedule is made for it.
        slow: which; those that it does not hold are passed over.
        rate: the share.
    """
    slower = {id(each) for each in slow}
    for group in list(optimizer.param_groups):
        taken = [each for each in group["params"] if id(each) in slower]
        if taken:
            group["params"] = [each for each in group["params"] if id(each) not in slower]
            optimizer.add_param_group({**group, "params": taken, "lr": group["lr"] * rate})


def _map_of(loss: Loss) -> LayerMap:
    found = getattr(loss, "layer_map", None)
    if not isinstance(found, LayerMap):
        raise LossError(
            f"--distill_progressive teaches one layer after another, and {loss.name} compares layers all at once: leave it out "
            f"(--distill_weights {loss.name}=0), or take a recipe with a layer map, such as mobilebert, tinybert or mud."
        )
    return found


def _refuse_together(model: nn.Module, losses: Sequence[Loss]) -> None:
    stacks = find_stacks(model)
    if len(stacks) > 1:
        raise LossError(
            f"--distill_progressive teaches the layers of one stack from the bottom, and the student has {' and '.join(stacks)}. Leave it "
            "out."
        )
    if any(stack.shared for stack in stacks.values()):
        raise LossError(
            "--distill_progressive freezes the layers that were taught, and the student's layers share their weights. Leave it out."
        )
    for loss in losses:
        _map_of(loss)
