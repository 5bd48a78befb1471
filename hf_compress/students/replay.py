"""A sample of real tokens, and what a part of a model makes of it: recorded in one run, and run again with other weights or inputs."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from hf_compress.errors import DataError

Side = Literal["in", "out"]
# Every so many-th example is not fitted on.
HELD_OUT = 5


@dataclass(frozen=True)
class Sample:
    """Examples, and which of their positions hold tokens.

    Attributes:
        inputs: batches as the model takes them, on its device.
        masks: for each batch (batch, time) bool.
        fitted: (tokens,) bool, False for the tokens of every fifth example, on which choices are made and errors measured.
    """

    inputs: tuple[dict[str, Tensor], ...]
    masks: tuple[Tensor, ...]
    fitted: Tensor

    def flat(self, states: Sequence[Tensor]) -> Tensor:
        """One (batch, time, width) for each batch -> (tokens, width) float32, without padding."""
        return torch.cat([state[mask].float() for state, mask in zip(states, self.masks, strict=True)])


def read_sample(model: PreTrainedModel, examples: Iterable[Mapping[str, Any]], *, max_tokens: int, min_tokens: int) -> Sample:
    """Take examples from the front until there are tokens enough.

    Args:
        model: the teacher; what its encoder's forward does not take is left out.
        examples: dicts of tensors (batch, time), padded, with `attention_mask` where there is padding.
        max_tokens: no batch is read once there are so many.
        min_tokens: fewer are refused.

    Raises:
        DataError: no `input_ids` of two dimensions, or too few tokens.
    """
    device = next(model.parameters()).device
    known = set(inspect.signature(model.base_model.forward).parameters)
    inputs, masks, fitted = [], [], []
    tokens = rows = 0
    for batch in examples:
        ids = batch.get("input_ids")
        if not isinstance(ids, Tensor) or ids.dim() != 2:
            raise DataError(
                "The examples of a warm start are batches, dicts of tensors (batch, tokens) with input_ids, as a data collator makes them; "
                f"found {', '.join(batch) or 'an empty one'}{'' if ids is None else f', input_ids of {_shape(ids)}'}."
            )
        mask = batch.get("attention_mask", torch.ones_like(ids)).to(device).bool()
        inputs.append({name: value.to(device) for name, value in batch.items() if name in known and isinstance(value, Tensor)})
        masks.append(mask)
        row = rows + torch.arange(len(ids), device=device)[:, None].expand_as(mask)
        fitted.append((row % HELD_OUT != HELD_OUT - 1)[mask])
        rows += len(ids)
        tokens += int(mask.sum())
        if tokens >= max_tokens:
            break
    if tokens < min_tokens or rows < HELD_OUT:
        raise DataError(
            f"The examples of the warm start have {tokens} tokens in {rows} examples; the basis needs {min_tokens} tokens at least, and "
            f"{HELD_OUT} examples, better {max_tokens} tokens. Give more or longer examples."
        )
    return Sample(tuple(inputs), tuple(masks), torch.cat(fitted))


@dataclass(frozen=True)
class Calls:
    """How a module was called, once a batch: the hidden states that came in, and everything else."""

    hidden_states: tuple[Tensor, ...]
    others: tuple[tuple[tuple[Any, ...], dict[str, Any]], ...]


@dataclass(frozen=True)
class Run:
    """A model's run on a sample.

    Attributes:
        calls: how its first layer was called.
        states: by layer, 0 the embeddings, for each batch (batch, time, width).
        noted: what was watched, one tensor a batch.
    """

    calls: Calls
    states: list[list[Tensor]]
    noted: dict[str, list[Tensor]]


def run(model: nn.Module, first_layer: nn.Module, sample: Sample, watch: Mapping[str, tuple[str, Side]]) -> Run:
    """Run a model on a sample.

    Args:
        model: with its head, or an encoder.
        first_layer: its layer 1.
        sample: what it reads.
        watch: by name, what to note: the path of a module in the model, and whether what comes in or goes out.
    """
    incoming: list[Tensor] = []
    others: list[tuple[tuple[Any, ...], dict[str, Any]]] = []

    def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        incoming.append(args[0])
        others.append((args[1:], kwargs))

    noted: dict[str, list[Tensor]] = {name: [] for name in watch}
    handle = first_layer.register_forward_pre_hook(hook, with_kwargs=True)
    try:
        with _watching(model, watch, noted):
            states = [model(**inputs, output_hidden_states=True).hidden_states for inputs in sample.inputs]
    finally:
        handle.remove()
    return Run(Calls(tuple(incoming), tuple(others)), [list(layer) for layer in zip(*states, strict=True)], noted)


def replay(
    module: nn.Module, calls: Calls, states: Sequence[Tensor], sample: Sample, watch: Mapping[str, tuple[str, Side]]
) -> tuple[list[Tensor], dict[str, Tensor]]:
    """Run a layer again on other hidden states.

    Args:
        module: the layer.
        calls: how a layer of that model was called.
        states: for each batch (batch, time, width).
        sample: which positions hold tokens.
        watch: by name, what to note: the path of a module in the layer, and whether what comes in or goes out.

    Returns:
        The layer's outputs, one a batch, and what was noted, (tokens, width) each.
    """
    noted: dict[str, list[Tensor]] = {name: [] for name in watch}
    outputs = []
    with _watching(module, watch, noted):
        for state, (args, kwargs) in zip(states, calls.others, strict=True):
            output = module(state, *args, **kwargs)
            outputs.append(output[0] if isinstance(output, tuple) else output)
    return outputs, {name: sample.flat(parts) for name, parts in noted.items()}


@contextmanager
def _watching(module: nn.Module, watch: Mapping[str, tuple[str, Side]], noted: Mapping[str, list[Tensor]]) -> Iterator[None]:
    handles = []
    for name, (path, side) in watch.items():
        watched = module.get_submodule(path)
        if side == "in":
            handles.append(watched.register_forward_pre_hook(lambda _, args, name=name: noted[name].append(args[0])))
        else:
            handles.append(watched.register_forward_hook(lambda _, __, output, name=name: noted[name].append(output)))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def evaluating(*models: nn.Module) -> Iterator[None]:
    """Evaluation mode without gradients; modes come back on the way out."""
    modes = {module: module.training for model in models for module in model.modules()}
    for model in models:
        model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module, training in modes.items():
            module.training = training


def _shape(value: Any) -> str:
    return f"shape {tuple(value.shape)}" if isinstance(value, Tensor) else f"type {type(value).__name__}"
