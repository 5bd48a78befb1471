"""How much the loss of a model depends on each attention head and each feed-forward neuron.

A unit (a head, a neuron) writes c . w into the layer's output, c what it computes and w its columns of the output layer. Were it taken
out, an example's loss L would change, to first order, by

    I(x) = | sum over tokens and the unit's dimensions of  c * dL/dc |  =  | sum over the unit's weights of  w * dL(x)/dw |

and a unit's importance is the mean of I over the examples (Molchanov et al. 1611.06440, eq. 8; of heads Michel et al. 1905.10650, eq. 2).
The absolute value is taken example by example: what helps one example and harms another is important, and does not cancel out.
The code behind ROSITA (Liu et al. 2103.11367) adds up | w | * sum over batches of | dL/dw | for each single weight instead, where
weights that cancel each other within a unit count twice and the batch size matters: `faithful="released_code"`.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from hf_compress.errors import ArgumentError, DataError, TeacherError
from hf_compress.students.encoder_parts import EncoderParts, linear

Faithful = Literal["released_code"]

MIN_EXAMPLES = 32
"""Of fewer examples the ranking is mostly chance."""
DEFAULT_EXAMPLES = 512
_LABELS = ("labels", "start_positions", "end_positions")


@dataclass(frozen=True)
class Importance:
    """What the loss would lose, by layer, layer 1 first.

    Attributes:
        heads: for each layer (heads,), float64 on the CPU.
        neurons: for each layer (neurons,), float64 on the CPU.
        num_examples: how many examples were seen.
    """

    heads: tuple[Tensor, ...]
    neurons: tuple[Tensor, ...]
    num_examples: int


def measure_importance(
    model: PreTrainedModel,
    parts: EncoderParts,
    batches: Iterable[Mapping[str, Any]],
    *,
    num_examples: int = DEFAULT_EXAMPLES,
    faithful: Faithful | None = None,
) -> Importance:
    """Measure the importance of every head and neuron; the model runs in evaluation mode and is left as it was.

    Args:
        model: with a head that makes a loss of labels.
        parts: where it keeps what.
        batches: dicts of tensors (batch, ...) with labels, as the model takes them; what its forward does not take is left out.
        num_examples: examples beyond so many are not read.
        faithful: "released_code" for ROSITA's own sums; by default the sums above.

    Raises:
        ArgumentError: too few examples are asked for.
        DataError: too few are there, or they have no labels.
        TeacherError: a model that makes no loss of its labels, or none that depends on every layer and is finite.
    """
    if num_examples < MIN_EXAMPLES:
        raise ArgumentError(
            f"num_examples is {num_examples}; expected {MIN_EXAMPLES} at least, better {DEFAULT_EXAMPLES}: of fewer the order of heads and "
            "neurons is mostly chance."
        )
    layers = [*model.base_model.get_submodule(parts.layers).children()]
    meter = (_WeightMeter if faithful == "released_code" else _UnitMeter)(layers, parts)
    device = next(model.parameters()).device
    seen = 0
    with meter.attached(), _evaluating(model), tqdm(total=num_examples, desc="measuring importance", unit="ex") as bar:
        for batch in batches:
            inputs = _inputs(model, batch, num_examples - seen, device)
            count = len(next(iter(inputs.values())))
            meter.add(_loss(model, inputs), count)
            seen += count
            bar.update(count)
            if seen >= num_examples:
                break
    if seen < MIN_EXAMPLES:
        raise DataError(
            f"Importance is measured on {MIN_EXAMPLES} examples at least, better on {DEFAULT_EXAMPLES}, and there are {seen}: of so few "
            "the order of heads and neurons is mostly chance. Give more examples."
        )
    heads, neurons = meter.scores()
    for layer, scores in enumerate(zip(heads, neurons, strict=True), start=1):
        if not all(bool(score.isfinite().all()) and bool(score.any()) for score in scores):
            raise TeacherError(
                f"In layer {layer} the importance is 0 everywhere or not finite: the loss does not depend on that layer, or the model "
                "gives NaN. Look at the labels, and at the teacher's own score."
            )
    return Importance(tuple(each.cpu() for each in heads), tuple(each.cpu() for each in neurons), seen)


def most_important(scores: Tensor, number: int) -> Tensor:
    """The indices of so many of the highest scores, ascending, so that what is kept keeps its order; of equals the first."""
    order = scores.argsort(descending=True, stable=True)
    return order[:number].sort().values


class _UnitMeter:
    """Adds up | sum of c * dL/dc | by head and neuron, which needs the gradients of activations alone."""

    def __init__(self, layers: Sequence[nn.Module], parts: EncoderParts) -> None:
        attention: Any = layers[0].get_submodule(parts.attention)
        self._head_size = int(attention.attention_head_size)
        self._layers, self._parts = layers, parts
        # What goes into the output layers in one forward: in pieces, where a model works in chunks.
        self._outputs = [linear(layer, path) for path in (parts.attention_output, parts.feed_forward_output) for layer in layers]
        self._seen: list[list[Tensor]] = [[] for _ in self._outputs]
        self._sums = [torch.zeros(output.in_features, dtype=torch.float64, device=output.weight.device) for output in self._outputs]
        for place in range(len(layers)):
            self._sums[place] = self._sums[place][:: self._head_size].clone()

    @contextlib.contextmanager
    def attached(self) -> Iterator[None]:
        """Within it the hooks are on the layers."""
        # Gradients are wanted from layer 1 on, though nothing below it, and maybe no parameter at all, requires them.
        handles = [self._layers[0].register_forward_pre_hook(_start_of_graph)]
        handles += [output.register_forward_pre_hook(self._hook(place)) for place, output in enumerate(self._outputs)]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def add(self, loss: Tensor, count: int) -> None:
        """Take the gradients of a loss that is the mean over `count` examples."""
        flat = [piece for pieces in self._seen for piece in pieces]
        gradients = iter(torch.autograd.grad(loss, flat))
        for place, pieces in enumerate(self._seen):
            by_example = torch.zeros((), device=loss.device)
            for piece in pieces:
                products = piece.detach().float() * next(gradients).float()  # (rows, tokens, width)
                # (examples, width): an example of multiple choice has several rows
                by_example = by_example + products.sum(1).view(count, -1, products.shape[-1]).sum(1)
            if place < len(self._layers):
                by_example = by_example.view(count, -1, self._head_size).sum(-1)  # (examples, heads)
            self._sums[place] += by_example.double().abs().sum(0) * count  # the gradient of the mean is 1/count of an example's
            pieces.clear()

    def scores(self) -> tuple[list[Tensor], list[Tensor]]:
        """Heads and neurons, by layer."""
        return self._sums[: len(self._layers)], self._sums[len(self._layers) :]

    def _hook(self, place: int) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...]) -> None:
            self._seen[place].append(args[0])

        return hook


class _WeightMeter:
    """Adds up |dL/dw| over batches, and multiplies by |w|, weight by weight, as ROSITA's code does."""

    def __init__(self, layers: Sequence[nn.Module], parts: EncoderParts) -> None:
        attention: Any = layers[0].get_submodule(parts.attention)
        self._head_size = int(attention.attention_head_size)
        paths = (parts.attention_output, parts.feed_forward_input, parts.feed_forward_output)
        self._weights = [linear(layer, path).weight for path in paths for layer in layers]
        self._sums = [torch.zeros_like(weight) for weight in self._weights]
        self._num_layers = len(layers)

    @contextlib.contextmanager
    def attached(self) -> Iterator[None]:
        """Within it the weights require gradients."""
        before = [weight.requires_grad for weight in self._weights]
        for weight in self._weights:
            weight.requires_grad_(True)
        try:
            yield
        finally:
            for weight, required in zip(self._weights, before, strict=True):
                weight.requires_grad_(required)

    def add(self, loss: Tensor, count: int) -> None:
        """Take the gradients of a batch's loss."""
        for total, gradient in zip(self._sums, torch.autograd.grad(loss, self._weights), strict=True):
            total += gradient.abs()

    def scores(self) -> tuple[list[Tensor], list[Tensor]]:
        """Heads and neurons, by layer."""
        products = [(total * weight.detach().abs()).double() for total, weight in zip(self._sums, self._weights, strict=True)]
        by_kind = [products[start : start + self._num_layers] for start in range(0, len(products), self._num_layers)]
        heads = [product.sum(0).view(-1, self._head_size).sum(-1) for product in by_kind[0]]
        return heads, [inner.sum(1) + outer.sum(0) for inner, outer in zip(by_kind[1], by_kind[2], strict=True)]


def _start_of_graph(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
    return (args[0].detach().requires_grad_(True), *args[1:])


def _inputs(model: PreTrainedModel, batch: Mapping[str, Any], limit: int, device: torch.device) -> dict[str, Tensor]:
    known = set(inspect.signature(model.forward).parameters)
    named = {"labels" if name == "label" else name: value for name, value in batch.items()}
    inputs = {name: value[:limit].to(device) for name, value in named.items() if name in known and isinstance(value, Tensor)}
    if not any(name in inputs for name in _LABELS):
        wanted = "start_positions and end_positions" if "start_positions" in known else "labels"
        if "labels" not in known and "start_positions" not in known:
            raise TeacherError(
                f"{type(model).__name__} takes no labels, so there is no loss whose gradient could tell what is important. Fine-tune it "
                "with a head first, or prune its depth and its embeddings alone, which takes no examples."
            )
        raise DataError(
            f"Importance is the gradient of the loss, which {type(model).__name__} makes of {wanted}, and a batch holds "
            f"{', '.join(named) or 'nothing'}. Give labelled examples."
        )
    return inputs


def _loss(model: PreTrainedModel, inputs: Mapping[str, Tensor]) -> Tensor:
    with torch.enable_grad():
        loss: Tensor = model(**inputs).loss
    if not bool(loss.detach().isfinite()):
        raise TeacherError(f"The loss of {type(model).__name__} is {float(loss.detach())} on these examples. Look at their labels.")
    return loss


@contextlib.contextmanager
def _evaluating(model: PreTrainedModel) -> Iterator[None]:
    """Evaluation mode, undone on the way out."""
    modes = {module: module.training for module in model.modules()}
    problem_type = getattr(model.config, "problem_type", None)
    model.train(False)
    try:
        yield
    finally:
        model.config.problem_type = problem_type  # transformers writes it down when a classifier first sees labels
        for module, training in modes.items():
            module.training = training
