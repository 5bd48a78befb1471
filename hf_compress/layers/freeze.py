"""Keep embeddings or layers as they are during training."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from torch import nn

from hf_compress.errors import LayerDropError
from hf_compress.layers.record import recorded_drop
from hf_compress.layers.stack import LayerStack, find_stacks, pretrained_model
from hf_compress.layers.strategies import check_layer_numbers


def freeze(model: nn.Module, *, embeddings: bool = False, layers: Sequence[int] = (), stack: str | None = None) -> None:
    """Set requires_grad to False for the embeddings, or for layers counted from 1 in the full model, before dropping.

    On a model whose config records a drop, the numbers are still those of the full model; layers that are gone are passed
    over. In encoder-decoders the layers of both stacks are meant unless `stack` names one. The whole block of embeddings is
    frozen (positions, token types and norm too), as in Sajjad et al.'s script; an output layer tied to it is frozen with it.

    Raises LayerDropError, with nothing frozen, if a number is no layer of the model, or if layers are shared (ALBERT) and
    only some are named.
    """
    frozen: list[nn.Module] = list(_embedding_modules(model)) if embeddings else []
    if layers:
        frozen += _layer_modules(model, tuple(layers), stack)
    for module in frozen:
        for parameter in module.parameters():
            parameter.requires_grad = False


def check_freeze(model: nn.Module, layers: Sequence[int], stack: str | None = None) -> None:
    """Raise what `freeze` would raise for these layers; nothing is changed."""
    if layers:
        _layer_modules(model, tuple(layers), stack)


def _layer_modules(model: nn.Module, layers: tuple[int, ...], name: str | None) -> list[nn.Module]:
    stacks = find_stacks(model)
    if name is not None and name not in stacks:
        raise LayerDropError(
            f"stack is {name!r}, but {type(model).__name__} has {' and '.join(map(repr, stacks))}: choose one of them, or leave it out."
        )
    recorded = recorded_drop(pretrained_model(model).config) or {}
    modules: list[nn.Module] = []
    for stack in (stacks[name],) if name is not None else stacks.values():
        kept = recorded[stack.name].kept if stack.name in recorded else tuple(range(1, stack.depth + 1))
        full = recorded[stack.name].num_layers if stack.name in recorded else stack.depth
        numbers = check_layer_numbers(layers, full, "layers_to_freeze")
        here = [position for position, layer in enumerate(kept, start=1) if layer in numbers]
        _check_shared(stack, here)
        modules += [stack.module(position) for position in here]
    return modules


def _check_shared(stack: LayerStack, positions: list[int]) -> None:
    if not stack.shared:
        return
    named = {stack.group(position) for position in positions}
    others = {stack.group(position) for position in range(1, stack.depth + 1) if position not in positions}
    if named & others:
        raise LayerDropError(
            f"layers_to_freeze names some of {stack.depth} layers that share their weights, so that the others would "
            "be frozen with them: name all, or none."
        )


def _embedding_modules(model: nn.Module) -> Iterator[nn.Module]:
    """The block that holds the input embeddings, and embeddings beside it; not the position biases of attention."""
    owner = pretrained_model(model)
    stacks = find_stacks(model).values()
    table = owner.get_input_embeddings()
    path = next((name for name, module in owner.named_modules() if module is table), None)
    if path is not None:
        block = path.split(".")
        for length in range(1, len(block) + 1):
            above = ".".join(block[:length])
            if not any(f"{stack.path}.".startswith(f"{above}.") for stack in stacks):
                yield owner.get_submodule(above)
                break
    for name, module in owner.named_modules():
        inside = any(name.startswith(f"{stack.path}.") for stack in stacks)
        if isinstance(module, nn.Embedding) and not inside and not name.rpartition(".")[2].startswith("rel"):
            yield module
