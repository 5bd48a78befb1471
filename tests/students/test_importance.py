"""The importance of heads and neurons: against loops written out, one example and one unit at a time."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from hf_compress.errors import DataError, TeacherError
from hf_compress.students.encoder_parts import linear, parts_of
from hf_compress.students.importance import Faithful, Importance, measure_importance, most_important
from tests.students.pruning import FAMILIES, HEAD_SIZE, HEADS, NEURONS, labelled, teacher
from tests.tiny_models import tiny_batch


def measured(model: PreTrainedModel, batches: Any, **more: Any) -> Importance:
    parts = parts_of(model.config.model_type)
    assert parts is not None
    return measure_importance(model, parts, batches, **more)


def layers_of(model: PreTrainedModel) -> list[Any]:
    parts = parts_of(model.config.model_type)
    assert parts is not None
    return list(model.base_model.get_submodule(parts.layers).children())


def units_one_by_one(model: PreTrainedModel, batches: list[dict[str, Tensor]]) -> tuple[list[Tensor], list[Tensor]]:
    """| sum of w * dL/dw | over each unit's weights in its output layer, for one example after the other."""
    parts = parts_of(model.config.model_type)
    assert parts is not None
    model = copy.deepcopy(model).eval()
    heads = [torch.zeros(HEADS) for _ in layers_of(model)]
    neurons = [torch.zeros(NEURONS) for _ in layers_of(model)]
    for batch in batches:
        for row in range(len(next(iter(batch.values())))):
            model.zero_grad()
            model(**{name: value[row : row + 1] for name, value in batch.items()}).loss.backward()
            for place, layer in enumerate(layers_of(model)):
                attention = linear(layer, parts.attention_output).weight
                for head in range(HEADS):
                    columns = slice(head * HEAD_SIZE, (head + 1) * HEAD_SIZE)
                    assert attention.grad is not None
                    heads[place][head] += (attention[:, columns] * attention.grad[:, columns]).sum().abs().detach()
                outer = linear(layer, parts.feed_forward_output).weight
                for neuron in range(NEURONS):
                    assert outer.grad is not None
                    neurons[place][neuron] += (outer[:, neuron] * outer.grad[:, neuron]).sum().abs().detach()
    return heads, neurons


def weights_one_by_one(model: PreTrainedModel, batches: list[dict[str, Tensor]]) -> tuple[list[Tensor], list[Tensor]]:
    """sum over a unit's weights of |w| * sum over batches of |dL/dw|."""
    parts = parts_of(model.config.model_type)
    assert parts is not None
    model = copy.deepcopy(model).eval()
    sums: dict[int, Tensor] = {}
    for batch in batches:
        model.zero_grad()
        model(**batch).loss.backward()
        for weight in model.parameters():
            if weight.grad is not None:
                sums[id(weight)] = sums.get(id(weight), torch.zeros_like(weight)) + weight.grad.abs()
    heads, neurons = [], []
    for layer in layers_of(model):
        attention, inner, outer = (
            linear(layer, path).weight for path in (parts.attention_output, parts.feed_forward_input, parts.feed_forward_output)
        )
        scores = {weight: sums[id(weight)] * weight.abs() for weight in (attention, inner, outer)}
        heads.append(torch.stack([scores[attention][:, head * HEAD_SIZE : (head + 1) * HEAD_SIZE].sum() for head in range(HEADS)]).detach())
        neurons.append(torch.stack([scores[inner][row].sum() + scores[outer][:, row].sum() for row in range(NEURONS)]).detach())
    return heads, neurons


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("faithful", [None, "released_code"])
def test_it_equals_the_plain_loop(family: str, faithful: Faithful | None) -> None:
    model = teacher(family)
    batches = labelled(model)
    found = measured(model, batches, faithful=faithful)
    heads, neurons = weights_one_by_one(model, batches) if faithful else units_one_by_one(model, batches)
    assert found.num_examples == 32
    for ours, theirs in zip((*found.heads, *found.neurons), (*heads, *neurons), strict=True):
        torch.testing.assert_close(ours.float(), theirs, rtol=1e-4, atol=1e-6)
        assert theirs.max() > 0


@pytest.mark.parametrize("head", ["token_classification", "question_answering", "multiple_choice", "masked_lm"])
def test_every_head_has_importance(head: str) -> None:
    model = teacher(head=head)
    found = measured(model, labelled(model, batches=4))
    assert found.num_examples == (32 if head == "multiple_choice" else 64)
    assert all(score.shape == (HEADS,) and score.min() > 0 for score in found.heads)


def test_a_head_that_does_nothing_has_none() -> None:
    model = teacher()
    with torch.no_grad():
        layers_of(model)[1].attention.output.dense.weight[:, 2 * HEAD_SIZE : 3 * HEAD_SIZE] = 0
        layers_of(model)[2].output.dense.weight[:, 5] = 0
    found = measured(model, labelled(model))
    assert found.heads[1][2] == 0
    assert found.heads[1].argmin() == 2
    assert found.neurons[2].argmin() == 5


def test_it_is_what_the_loss_loses_to_first_order() -> None:
    # An example at a time, scaling a head's output by 1 - e changes the loss by e * I.
    model = teacher().double()
    (batch,) = labelled(model, batches=1, batch_size=32)
    found = measured(model, [batch]).heads[0]
    weight, step = layers_of(model)[0].attention.output.dense.weight, 1e-5
    changes = torch.zeros(HEADS, dtype=torch.float64)
    with torch.no_grad():
        for head in range(HEADS):
            columns = slice(head * HEAD_SIZE, (head + 1) * HEAD_SIZE)
            for row in range(32):
                example = {name: value[row : row + 1] for name, value in batch.items()}
                losses = []
                for scale in (1 - step, 1 / (1 - step)):
                    weight[:, columns] *= scale
                    losses.append(model(**example).loss)
                changes[head] += (losses[0] - losses[1]).abs() / step
    torch.testing.assert_close(found, changes, rtol=1e-3, atol=1e-6)


def test_padding_and_the_size_of_batches_change_nothing() -> None:
    model = teacher()
    (batch,) = labelled(model, batches=1, batch_size=32)
    padded = {name: torch.nn.functional.pad(value, (0, 9)) if value.dim() == 2 else value for name, value in batch.items()}
    parts = [{name: value[start : start + 5] for name, value in batch.items()} for start in range(0, 32, 5)]
    found = measured(model, [batch])
    for other in (measured(model, [padded]), measured(model, parts)):
        for ours, theirs in zip((*found.heads, *found.neurons), (*other.heads, *other.neurons), strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("faithful", [None, "released_code"])
def test_the_model_is_left_as_it_was_and_dropout_is_off(faithful: Faithful | None) -> None:
    model = teacher(hidden_dropout_prob=0.5).train().requires_grad_(False)
    first, second = (measured(model, labelled(model), faithful=faithful) for _ in range(2))
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(first.neurons, second.neurons, strict=True))
    assert all(module.training for module in model.modules())
    assert not any(parameter.requires_grad or parameter.grad is not None for parameter in model.parameters())
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_no_more_examples_than_asked_for_are_read() -> None:
    model = teacher()
    found = measured(model, iter(labelled(model, batches=5)), num_examples=40)
    assert found.num_examples == 40


def test_the_most_important_keep_their_order_and_of_equals_the_first_stays() -> None:
    assert most_important(torch.tensor([0.1, 0.9, 0.3, 0.9, 0.2]), 3).tolist() == [1, 2, 3]
    assert most_important(torch.tensor([0.5, 0.5, 0.5]), 2).tolist() == [0, 1]


def test_too_few_examples_are_refused() -> None:
    model = teacher()
    with pytest.raises(DataError, match="32 examples at least, better on 512, and there are 31"):
        measured(model, labelled(model, batches=1, batch_size=31))
    with pytest.raises(DataError, match="there are 0"):
        measured(model, [])


def test_examples_without_labels_are_refused() -> None:
    model = teacher()
    with pytest.raises(DataError, match="makes of labels, and a batch holds input_ids, attention_mask"):
        measured(model, [tiny_batch(model, 32)])
    with pytest.raises(DataError, match="start_positions and end_positions"):
        measured(teacher(head="question_answering"), [tiny_batch(model, 32)])
    with pytest.raises(TeacherError, match="BertModel takes no labels"):
        measured(teacher(head="base"), [tiny_batch(model, 32)])


def test_a_loss_that_is_not_finite_is_refused() -> None:
    model = teacher(head="token_classification")
    batch = labelled(model, batches=1, batch_size=32)[0]
    with pytest.raises(TeacherError, match="The loss of BertForTokenClassification is nan"):
        measured(model, [{**batch, "labels": torch.full_like(batch["labels"], -100)}])


def test_a_layer_on_which_the_loss_does_not_depend_is_refused() -> None:
    model = teacher()
    with torch.no_grad():
        layers_of(model)[1].attention.output.dense.weight.zero_()
    with pytest.raises(TeacherError, match="In layer 2 the importance is 0 everywhere"):
        measured(model, labelled(model))
