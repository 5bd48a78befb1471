"""Which layers change their input least: the contribution strategy.

A layer whose output points where its input did contributes little. For each example the cosine between a layer's input and
its raw output is taken at the summary token (first real token; last real one in XLNet and decoders) and averaged over the
examples (Sajjad et al., arXiv 2004.03844, section 2.3). The paper takes the development set and drops above 0.95 or 0.925.
"""

from __future__ import annotations

import contextlib
import inspect
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from itertools import islice
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import cosine_similarity

from hf_compress.agreement import all_or_none, joined, several
from hf_compress.errors import LayerDropError
from hf_compress.layers.stack import LayerStack, find_stacks, pretrained_model
from hf_compress.layers.strategies import check_num_layers_to_drop
from hf_compress.layers.zero import is_split, split_again, whole_parameters

MAX_EXAMPLES = 512
LABEL_NAMES = ("labels", "label", "label_ids", "start_positions", "end_positions", "next_sentence_label")
Collator = Callable[[list[Any]], Mapping[str, Any]]


def measure_contribution(
    model: nn.Module, batches: Iterable[Mapping[str, Any]], *, tokens: Literal["summary", "all"] = "summary"
) -> dict[str, tuple[float, ...]]:
    """The mean cosine similarity of each layer's input and output, layer 1 first, by stack.

    `batches` are dicts of tensors (batch, ...) as the model takes them; what its forward does not take is left out, and only
    the first 512 examples count. `tokens="all"` takes the mean over all real tokens instead of the summary token. The model
    runs in evaluation mode, without gradients, and is left as it was. Among several processes the first measures, and tells the others;
    where they hold parts of the parameters, all measure together.

    Raises LayerDropError without examples, or if a similarity is not finite.
    """
    if not several():
        return _measured(model, batches, tokens)
    measured: list[dict[str, tuple[float, ...]]] = []
    with all_or_none():
        if is_split(model) or torch.distributed.get_rank() == 0:
            measured = [_measured(model, batches, tokens)]
    told: list[dict[str, tuple[float, ...]]] = joined(measured)
    return told[0]


def _measured(model: nn.Module, batches: Iterable[Mapping[str, Any]], tokens: Literal["summary", "all"]) -> dict[str, tuple[float, ...]]:
    owner = pretrained_model(model)
    meters = [_Meter(stack, tokens) for stack in find_stacks(model).values()]
    device = next(owner.parameters()).device
    seen = 0
    with whole_parameters(owner), _evaluating(owner), torch.no_grad(), _own_random_numbers(), contextlib.ExitStack() as hooks:
        for meter in meters:
            hooks.enter_context(meter.attached())
        for batch in batches:
            inputs = _inputs(owner, batch, MAX_EXAMPLES - seen, device)
            for meter in meters:
                meter.begin(inputs, owner.config)
            owner(**inputs)
            seen += len(next(iter(inputs.values())))
            if seen >= MAX_EXAMPLES:
                break
    split_again(model)
    if not seen:
        raise LayerDropError("The strategy 'contribution' measures the layers on examples, and there are none: the data given is empty.")
    measured = {meter.stack.name: meter.means() for meter in meters}
    for name, similarities in measured.items():
        bad = [layer for layer, value in enumerate(similarities, start=1) if not math.isfinite(value)]
        if bad:
            raise LayerDropError(
                f"The similarity of input and output is not finite in layer {bad[0]} ({name}): the model gives NaN or infinity."
            )
    return measured


def choose_by_contribution(
    similarities: tuple[float, ...], candidates: tuple[int, ...], *, num_layers_to_drop: int | None = None, threshold: float | None = None
) -> tuple[int, ...]:
    """The layers, counted from 1 and ascending, that contribute least, out of `candidates`.

    Either the `num_layers_to_drop` most similar ones (of equals the higher one), or all above `threshold`. Raises
    LayerDropError, with the similarities, if none or more than half of the layers are above it, or too few may go.
    """
    num_layers = len(similarities)
    listed = ", ".join(f"{layer}: {value:.4f}" for layer, value in enumerate(similarities, start=1))
    if num_layers_to_drop is not None:
        check_num_layers_to_drop(num_layers, num_layers_to_drop)
        if num_layers_to_drop > len(candidates):
            raise LayerDropError(
                f"num_layers_to_drop is {num_layers_to_drop}, but only {len(candidates)} of {num_layers} layers may "
                "be dropped from this model: layer 1 has to stay."
            )
        most_similar = sorted(candidates, key=lambda layer: (similarities[layer - 1], layer), reverse=True)
        return tuple(sorted(most_similar[:num_layers_to_drop]))
    assert threshold is not None
    above = tuple(layer for layer in candidates if similarities[layer - 1] > threshold)
    if above and len(above) <= num_layers / 2:
        return above
    found = f"{len(above)} of {num_layers} layers, more than half, have" if above else "No layer that may go has"
    fitting = _fitting_threshold([similarities[layer - 1] for layer in candidates], num_layers // 2, raised=bool(above))
    change, bound = ("Raise", "smallest") if above else ("Lower", "largest")
    way_out = (
        f"{change} the threshold: the {bound} that works here is about {fitting} (--layer_drop_threshold {fitting}). " if fitting else ""
    )
    raise LayerDropError(
        f"{found} an input and output more alike than the threshold {threshold}. Similarities by layer: {listed}. "
        f"{way_out}{'Or say' if way_out else 'Say'} how many layers go instead: --num_layers_to_drop, from 1 to {num_layers - 1}."
    )


def _fitting_threshold(similarities: list[float], most: int, *, raised: bool) -> float | None:
    """The threshold nearest to the one that failed, with at least one and at most `most` similarities above it; None if there is none."""
    ordered = sorted(similarities, reverse=True)
    at_least = ordered[most] if raised and most < len(ordered) else -1.0
    for digits in (2, 3, 4, 6):
        step = 10**digits
        value = (math.ceil(at_least * step) if raised else math.ceil(ordered[0] * step) - 1) / step
        if 0 < value < 1 and at_least <= value < ordered[0]:
            return value
    return None


def batches_of(
    examples: Iterable[Mapping[str, Any]], model: nn.Module, collator: Collator | None = None, batch_size: int = 32
) -> Iterator[Mapping[str, Any]]:
    """Batches for `measure_contribution` from the first 512 examples, in their order.

    `examples` is a data set or list of tokenised examples, or an iterable of ready batches (their values are tensors with a
    batch axis), which pass as they are. `collator` joins examples; without one, lists are padded on the right.
    """
    owner = pretrained_model(model)
    known = {*inspect.signature(owner.forward).parameters, *LABEL_NAMES}
    rows: list[dict[str, Any]] = []
    for example in islice(iter(examples), MAX_EXAMPLES):
        if _is_batch(example):
            yield example
            continue
        rows.append({name: value for name, value in example.items() if name in known})
        if len(rows) == batch_size:
            yield collator(rows) if collator else _pad(rows, owner.config)
            rows = []
    if rows:
        yield collator(rows) if collator else _pad(rows, owner.config)


class _Meter:
    """Sums up, for one stack, how alike its layers' inputs and outputs are; hooks on the layers call it."""

    def __init__(self, stack: LayerStack, tokens: Literal["summary", "all"]) -> None:
        self.stack = stack
        self.tokens = tokens
        self.sums = [0.0] * stack.depth
        self.counts = [0] * stack.depth
        self.calls = 0
        self.mask: Tensor | None = None

    @contextlib.contextmanager
    def attached(self) -> Iterator[None]:
        handles = [module.register_forward_hook(self._hook(place), with_kwargs=True) for place, module in enumerate(self.stack.modules)]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def begin(self, inputs: Mapping[str, Tensor], config: Any) -> None:
        self.calls = 0
        self.mask = _real_tokens(inputs, self.stack, config)

    def means(self) -> tuple[float, ...]:
        return tuple(total / count if count else math.nan for total, count in zip(self.sums, self.counts, strict=True))

    def _hook(self, place: int) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            self._add(self.calls if self.stack.shared else place, _hidden_input(args, kwargs), _hidden_output(output))
            self.calls += 1

        return hook

    def _add(self, place: int, before: Tensor, after: Tensor) -> None:
        if self.stack.time_major:
            before, after = before.transpose(0, 1), after.transpose(0, 1)
        alike = cosine_similarity(before.float(), after.float(), dim=-1)  # (batch, time)
        mask = self.mask if self.mask is not None and self.mask.shape == alike.shape else torch.ones_like(alike, dtype=torch.bool)
        if self.tokens == "all":
            self.sums[place] += float(alike[mask].double().sum())
            self.counts[place] += int(mask.sum())
            return
        real = mask.long()
        column = real.argmax(dim=1) if self.stack.summary_token == "first" else real.shape[1] - 1 - real.flip(1).argmax(dim=1)
        self.sums[place] += float(alike.gather(1, column[:, None]).double().sum())
        self.counts[place] += len(alike)


def _real_tokens(inputs: Mapping[str, Tensor], stack: LayerStack, config: Any) -> Tensor | None:
    """(batch, time), True where a token is not padding; None if nothing says so."""
    if stack.side() == "decoder" and getattr(config, "is_encoder_decoder", False):
        if "decoder_attention_mask" in inputs:
            mask = inputs["decoder_attention_mask"].bool()
        elif "decoder_input_ids" in inputs:
            mask = inputs["decoder_input_ids"] != config.pad_token_id
            mask[:, 0] = True  # T5 starts its decoder with the padding token.
        elif "labels" in inputs:
            mask = inputs["labels"] != -100
        else:
            return None
    elif "attention_mask" in inputs:
        mask = inputs["attention_mask"].bool()
    elif "input_mask" in inputs:  # XLNet: 1 is padding.
        mask = ~inputs["input_mask"].bool()
    else:
        return None
    return mask.reshape(-1, mask.shape[-1])  # Multiple choice is (batch, choices, time).


def _inputs(owner: nn.Module, batch: Mapping[str, Any], limit: int, device: torch.device) -> dict[str, Tensor]:
    known = set(inspect.signature(owner.forward).parameters)
    tensors = {name: value[:limit].to(device) for name, value in batch.items() if name in known and isinstance(value, Tensor)}
    generates = getattr(owner.config, "is_encoder_decoder", False) and "decoder_input_ids" not in tensors
    inputs = {name: value for name, value in tensors.items() if name not in LABEL_NAMES or (generates and name == "labels")}
    if not inputs:
        raise LayerDropError(
            f"The examples for the strategy 'contribution' hold {', '.join(map(repr, batch)) or 'nothing'}, but "
            f"{type(owner).__name__} takes "
            "tensors such as 'input_ids' and 'attention_mask': give tokenised examples."
        )
    return inputs


def _hidden_input(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Tensor:
    if args and isinstance(args[0], Tensor):
        return args[0]
    named = kwargs.get("hidden_states", kwargs.get("output_h"))
    if isinstance(named, Tensor):
        return named
    raise LayerDropError("Cannot tell which argument of this model's layers holds the hidden states: 'contribution' does not serve here.")


def _hidden_output(output: Any) -> Tensor:
    first = output[0] if isinstance(output, (tuple, list)) else output
    if isinstance(first, Tensor):
        return first
    raise LayerDropError("Cannot tell which output of this model's layers holds the hidden states: 'contribution' does not serve here.")


@contextlib.contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode, undone on the way out."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, training in modes.items():
            module.training = training


@contextlib.contextmanager
def _own_random_numbers() -> Iterator[None]:
    """A collator that masks at random gives the same batches each time, and the run's own random numbers stay where they were."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)
        yield


def _is_batch(example: Mapping[str, Any]) -> bool:
    for name, axes in (("input_ids", 2), ("pixel_values", 4), ("inputs_embeds", 3)):
        value = example.get(name)
        if isinstance(value, Tensor):
            return value.dim() >= axes
    return False


def _pad(rows: list[dict[str, Any]], config: Any) -> dict[str, Tensor]:
    """Examples joined to a batch: lists are padded on the right, and a mask is made where there is none."""
    columns = {name: [torch.as_tensor(row[name]) for row in rows] for name in rows[0]}
    if "input_ids" in columns and "attention_mask" not in columns:
        columns["attention_mask"] = [torch.ones_like(ids) for ids in columns["input_ids"]]
    fill = {"input_ids": getattr(config, "pad_token_id", None) or 0, "labels": -100}
    batch: dict[str, Tensor] = {}
    for name, values in columns.items():
        if values[0].dim() == 1:
            batch[name] = nn.utils.rnn.pad_sequence(values, batch_first=True, padding_value=fill.get(name, 0))
        else:
            batch[name] = torch.stack(values)
    return batch
