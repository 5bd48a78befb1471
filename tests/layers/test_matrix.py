"""Every architecture x strategy x number of layers, without a skip: either the drop is right, or it is refused and nothing changed."""

from __future__ import annotations

import copy
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.utils import logging as transformers_logging

from hf_compress.errors import LayerDropError
from hf_compress.layers.drop import StackDrop, drop_layers
from hf_compress.layers.record import recorded_drop
from hf_compress.layers.stack import find_stacks
from hf_compress.layers.strategies import STRATEGIES, LayerDropStrategy
from tests.tiny_models import ARCHITECTURES, TINY, tiny_batch, tiny_model

transformers_logging.disable_progress_bar()

NUM_LAYERS = 4
# What goes of 4 layers, written down by hand from the rules of SEEDS 1.1. Contribution is measured; None is refused for every model.
DROPPED: dict[str, dict[int, tuple[int, ...] | None]] = {
    "top": {1: (4,), 2: (3, 4), 3: (2, 3, 4), 4: None},
    "bottom": {1: (1,), 2: (1, 2), 3: (1, 2, 3), 4: None},
    "symmetric": {1: (3,), 2: (2, 3), 3: (2, 3, 4), 4: None},
    "alternate": {1: (4,), 2: (2, 4), 3: None, 4: None},
    "alternate_odd": {1: (3,), 2: (1, 3), 3: None, 4: None},
}
# Layer 1 holds the relative position bias, has no attention norm, or feeds a convolution.
FIRST_LAYER_STAYS = {"t5", "modernbert", "deberta-v2-conv"}


@cache
def full(architecture: str) -> PreTrainedModel:
    return tiny_model(architecture, num_layers=NUM_LAYERS)


@torch.no_grad()
def logits(model: nn.Module) -> Tensor:
    out: Tensor = model(**tiny_batch(model)).logits
    return out


@cache
def full_logits(architecture: str) -> Tensor:
    return logits(full(architecture))


@torch.no_grad()
def logits_of_plain_loop(model: PreTrainedModel, dropped: dict[str, tuple[int, ...]]) -> Tensor:
    """What the full model gives when the dropped layers hand on what came in. Shared layers are counted by their calls."""
    handles = []
    for name, stack in find_stacks(model).items():
        calls = {"count": 0}

        def hand_on(
            module: nn.Module,
            args: tuple[Any, ...],
            kwargs: dict[str, Any],
            output: Any,
            *,
            calls: dict[str, int] = calls,
            gone: tuple[int, ...] = dropped[name],
        ) -> Any:
            calls["count"] += 1
            if calls["count"] not in gone:
                return output
            came_in = args[0] if args else kwargs.get("hidden_states", kwargs.get("output_h"))
            return came_in if isinstance(output, Tensor) else (came_in, *output[1:])

        handles += [module.register_forward_hook(hand_on, with_kwargs=True) for module in stack.modules]
    try:
        return logits(model)
    finally:
        for handle in handles:
            handle.remove()


def assert_survivors_unchanged(before: PreTrainedModel, after: PreTrainedModel, stacks: dict[str, StackDrop]) -> None:
    old, new = before.state_dict(), after.state_dict()
    seen = set()
    for name, stack in find_stacks(before).items():
        if stack.shared:
            continue
        seen |= {key for key in old if key.startswith(f"{stack.path}.")} | {key for key in new if key.startswith(f"{stack.path}.")}
        for position, layer in enumerate(stacks[name].kept, start=1):
            kept = find_stacks(after)[name].module(position).state_dict()
            for key, tensor in stack.module(layer).state_dict().items():
                assert torch.equal(kept[key], tensor), f"{name} {layer}: {key}"
    assert old.keys() - seen == new.keys() - seen
    assert all(torch.equal(old[key], new[key]) for key in old.keys() - seen)


def refused(architecture: str, strategy: str, number: int) -> bool:
    if number >= NUM_LAYERS:
        return True
    if strategy == "contribution":
        return False
    dropped = DROPPED[strategy][number]
    return dropped is None or (1 in dropped and architecture in FIRST_LAYER_STAYS)


@pytest.mark.parametrize("number", [1, 2, 3, 4])
@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_drop(architecture: str, strategy: LayerDropStrategy, number: int, tmp_path: Path) -> None:
    before = full(architecture)
    model = copy.deepcopy(before)
    batches = [tiny_batch(model)] if strategy == "contribution" else None
    if refused(architecture, strategy, number):
        with pytest.raises(LayerDropError):
            drop_layers(model, strategy=strategy, num_layers_to_drop=number, batches=batches)
        assert model.config.to_dict() == before.config.to_dict()
        assert_survivors_unchanged(before, model, {name: StackDrop((1, 2, 3, 4), (), 4) for name in find_stacks(before)})
        assert torch.equal(logits(model), full_logits(architecture))
        return
    drop = drop_layers(model, strategy=strategy, num_layers_to_drop=number, batches=batches)

    assert list(drop.stacks) == list(find_stacks(before))
    for stack in drop.stacks.values():
        assert len(stack.dropped) == number
        assert sorted((*stack.kept, *stack.dropped)) == [1, 2, 3, 4]
        if strategy != "contribution":
            assert stack.dropped == DROPPED[strategy][number]
    assert [getattr(model.config, name) for name in TINY[architecture].depth_names] == [NUM_LAYERS - number] * len(drop.stacks)
    assert {name: stack.depth for name, stack in find_stacks(model).items()} == dict.fromkeys(drop.stacks, NUM_LAYERS - number)
    assert_survivors_unchanged(before, model, drop.stacks)
    expected = logits_of_plain_loop(before, {name: stack.dropped for name, stack in drop.stacks.items()})
    assert (expected - full_logits(architecture)).abs().max() > 1e-4, "a layer that does nothing tests nothing"
    torch.testing.assert_close(logits(model), expected, rtol=0, atol=1e-6)

    model.save_pretrained(tmp_path)
    reloaded = type(model).from_pretrained(tmp_path)
    assert torch.equal(logits(reloaded), logits(model))
    recorded = recorded_drop(reloaded.config)
    assert recorded is not None
    assert {name: (kept.kept, kept.num_layers) for name, kept in recorded.items()} == {
        name: (stack.kept, NUM_LAYERS) for name, stack in drop.stacks.items()
    }
