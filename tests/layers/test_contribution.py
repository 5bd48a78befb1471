from __future__ import annotations

import re
from collections.abc import Iterator
from itertools import pairwise
from typing import Any

import pytest
import torch
from datasets import Dataset
from torch.nn.functional import cosine_similarity
from transformers import PreTrainedModel

from hf_compress.errors import LayerDropError
from hf_compress.layers.contribution import MAX_EXAMPLES, batches_of, choose_by_contribution, measure_contribution
from hf_compress.layers.drop import drop_layers
from tests.tiny_models import tiny_batch, tiny_model


def cosine(one: torch.Tensor, other: torch.Tensor) -> float:
    return float(one @ other / one.norm() / other.norm())


@torch.no_grad()
def similarities_by_hand(model: PreTrainedModel, batch: dict[str, torch.Tensor], column: str, states: str = "hidden_states") -> list[float]:
    """Loops over examples, from the model's own hidden states; these are the layers' raw outputs where no final norm follows."""
    hidden = model(**batch, output_hidden_states=True)[states]
    lengths = batch["attention_mask"].sum(1).tolist()
    result = []
    for before, after in pairwise(hidden):
        values = []
        for row, length in enumerate(lengths):
            columns = {"first": [0], "last": [length - 1], "all": list(range(length))}[column]
            values += [cosine(before[row, at], after[row, at]) for at in columns]
        result.append(sum(values) / len(values))
    return result


@pytest.mark.parametrize("architecture", ["bert", "roberta", "distilbert", "electra", "deberta-v2", "mpnet", "albert"])
def test_first_token(architecture: str) -> None:
    model = tiny_model(architecture)
    batch = tiny_batch(model)
    measured = measure_contribution(model, [batch])
    assert list(measured) == ["layers"]
    assert measured["layers"] == pytest.approx(similarities_by_hand(model, batch, "first"), abs=1e-5)


def test_last_real_token_of_xlnet() -> None:
    model = tiny_model("xlnet")
    batch = tiny_batch(model)
    assert measure_contribution(model, [batch])["layers"] == pytest.approx(similarities_by_hand(model, batch, "last"), abs=1e-5)


@pytest.mark.parametrize("architecture", ["gpt2", "llama", "qwen3"])
def test_last_real_token_of_decoders_before_the_final_norm(architecture: str) -> None:
    model = tiny_model(architecture)
    batch = tiny_batch(model)
    measured = measure_contribution(model, [batch])["layers"]
    by_hand = similarities_by_hand(model, batch, "last")
    assert measured[:-1] == pytest.approx(by_hand[:-1], abs=1e-5)
    assert measured[-1] != pytest.approx(by_hand[-1], abs=1e-3)  # The last hidden state comes after the norm, the layer's output before.


def test_encoder_and_decoder() -> None:
    model = tiny_model("bart")
    batch = tiny_batch(model)
    measured = measure_contribution(model, [batch])
    assert measured["encoder"] == pytest.approx(similarities_by_hand(model, batch, "first", "encoder_hidden_states"), abs=1e-5)
    with torch.no_grad():
        hidden = model(**batch, output_hidden_states=True).decoder_hidden_states
    expected = [float(cosine_similarity(one[:, -1], two[:, -1], dim=-1).mean()) for one, two in pairwise(hidden)]
    assert measured["decoder"] == pytest.approx(expected, abs=1e-5)


def test_a_decoder_fed_by_labels() -> None:
    model = tiny_model("t5")
    batch = tiny_batch(model, labels=True)
    with torch.no_grad():
        hidden = model(**batch, output_hidden_states=True).decoder_hidden_states
    lengths = (batch["labels"] != -100).sum(1).tolist()
    expected = [
        sum(cosine(one[row, length - 1], two[row, length - 1]) for row, length in enumerate(lengths)) / len(lengths)
        for one, two in pairwise(hidden[:-1])
    ]
    assert measure_contribution(model, [batch])["decoder"][:-1] == pytest.approx(expected, abs=1e-5)


def test_all_tokens() -> None:
    model = tiny_model("bert")
    batch = tiny_batch(model)
    measured = measure_contribution(model, [batch], tokens="all")["layers"]
    assert measured == pytest.approx(similarities_by_hand(model, batch, "all"), abs=1e-5)
    assert measured != pytest.approx(measure_contribution(model, [batch])["layers"], abs=1e-4)


def test_left_padding_moves_the_first_real_token() -> None:
    model = tiny_model("xlnet")
    batch = tiny_batch(model, 1, (5,))
    left = {
        "input_ids": torch.cat([torch.zeros(1, 3, dtype=torch.long), batch["input_ids"]], dim=1),
        "attention_mask": torch.cat([torch.zeros(1, 3, dtype=torch.long), batch["attention_mask"]], dim=1),
    }
    assert measure_contribution(model, [left])["layers"] == pytest.approx(measure_contribution(model, [batch])["layers"], abs=1e-4)


def test_mean_over_examples_not_batches_and_the_model_as_it_was() -> None:
    model = tiny_model("bert", hidden_dropout_prob=0.5).train()
    model.bert.embeddings.eval()
    batch = tiny_batch(model)
    parts = [{name: value[:1] for name, value in batch.items()}, {name: value[1:] for name, value in batch.items()}]
    whole = measure_contribution(model, [batch])["layers"]
    assert measure_contribution(model, parts)["layers"] == pytest.approx(whole, abs=1e-6)
    assert model.training
    assert not model.bert.embeddings.training
    assert not any(module._forward_hooks for layer in model.bert.encoder.layer for module in layer.modules())


def test_512_examples_count_and_no_more() -> None:
    model = tiny_model("bert", num_layers=1)
    batch = tiny_batch(model, 200)
    taken = 0

    def batches() -> Iterator[dict[str, torch.Tensor]]:
        nonlocal taken
        while True:
            taken += 1
            yield batch

    measured = measure_contribution(model, batches())["layers"]
    assert taken == 3
    first = {name: torch.cat([value, value, value])[:MAX_EXAMPLES] for name, value in batch.items()}
    assert measured == pytest.approx(measure_contribution(model, [first])["layers"], abs=1e-6)


def rows(batch: dict[str, torch.Tensor]) -> list[dict[str, Any]]:
    lengths = batch["attention_mask"].sum(1).tolist()
    return [{"input_ids": ids[:length].tolist(), "idx": 3, "text": "a"} for ids, length in zip(batch["input_ids"], lengths, strict=True)]


def test_examples_of_every_form_measure_the_same() -> None:
    model = tiny_model("bert")
    batch = tiny_batch(model)
    expected = measure_contribution(model, [batch])["layers"]
    listed = rows(batch)

    def collator(examples: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        assert set(examples[0]) == {"input_ids"}
        ids = [torch.tensor(example["input_ids"]) for example in examples]
        padded = torch.nn.utils.rnn.pad_sequence(ids, batch_first=True)
        return {"input_ids": padded, "attention_mask": (padded != 0).long()}

    for batches in (
        batches_of(listed, model),
        batches_of(listed, model, batch_size=2),
        batches_of(Dataset.from_list(listed), model),
        batches_of(listed, model, collator),
        batches_of([batch], model),
    ):
        assert measure_contribution(model, batches)["layers"] == pytest.approx(expected, abs=1e-5)


def test_a_random_collator_measures_the_same_each_time() -> None:
    model = tiny_model("bert")

    def collator(examples: list[Any]) -> dict[str, torch.Tensor]:
        return {"input_ids": torch.randint(3, 50, (len(examples), 6)), "attention_mask": torch.ones(len(examples), 6, dtype=torch.long)}

    torch.manual_seed(5)
    first = measure_contribution(model, batches_of(rows(tiny_batch(model)), model, collator))
    drawn = torch.rand(1)
    torch.manual_seed(5)
    assert torch.equal(torch.rand(1), drawn)
    assert measure_contribution(model, batches_of(rows(tiny_batch(model)), model, collator)) == first


def test_without_examples_or_with_examples_of_another_kind() -> None:
    model = tiny_model("bert")
    with pytest.raises(LayerDropError, match="the data given is empty"):
        measure_contribution(model, [])
    with pytest.raises(LayerDropError, match="give tokenised examples"):
        measure_contribution(model, [{"sentence": "text"}])
    model.bert.encoder.layer[1].output.dense.weight.data.fill_(float("nan"))
    with pytest.raises(LayerDropError, match="not finite in layer 2"):
        measure_contribution(model, [tiny_batch(model)])


def test_the_layers_that_change_least_go() -> None:
    alike = (0.5, 0.96, 0.7, 0.97, 0.96, 0.2)
    everyone = (1, 2, 3, 4, 5, 6)
    assert choose_by_contribution(alike, everyone, num_layers_to_drop=1) == (4,)
    assert choose_by_contribution(alike, everyone, num_layers_to_drop=2) == (4, 5)  # Of equals the higher one.
    assert choose_by_contribution(alike, everyone, num_layers_to_drop=4) == (2, 3, 4, 5)
    assert choose_by_contribution(alike, everyone, threshold=0.95) == (2, 4, 5)
    assert choose_by_contribution(alike, (3, 4, 5, 6), threshold=0.95) == (4, 5)
    with pytest.raises(LayerDropError, match=r"No layer.*0\.98.*1: 0\.5000, 2: 0\.9600.*Lower the threshold"):
        choose_by_contribution(alike, everyone, threshold=0.98)
    with pytest.raises(LayerDropError, match=r"4 of 6 layers, more than half.*3: 0\.7000.*Raise the threshold"):
        choose_by_contribution(alike, everyone, threshold=0.6)
    for failed in (0.6, 0.98):
        with pytest.raises(LayerDropError, match=r"--num_layers_to_drop, from 1 to 5") as refused:
            choose_by_contribution(alike, everyone, threshold=failed)
        named = re.findall(r"--layer_drop_threshold (\S+)\)", str(refused.value))
        assert 1 <= len(choose_by_contribution(alike, everyone, threshold=float(named[0]))) <= 3
    with pytest.raises(LayerDropError, match="only 4 of 6 layers may be dropped"):
        choose_by_contribution(alike, (3, 4, 5, 6), num_layers_to_drop=5)


def test_no_threshold_is_named_where_none_works() -> None:
    with pytest.raises(LayerDropError, match=r"0\.9000\. Say how many layers go instead: --num_layers_to_drop, from 1 to 3"):
        choose_by_contribution((0.9, 0.9, 0.9, 0.9), (1, 2, 3, 4), threshold=0.5)


def test_drop_by_contribution() -> None:
    model = tiny_model("bert", num_layers=6)
    batch = tiny_batch(model)
    for module in model.modules():
        if isinstance(module, torch.nn.LayerNorm):
            module.reset_parameters()
    for layer in (2, 5):  # With outputs near 0 what came in goes through the norms alone, which hand it on.
        for part in (model.bert.encoder.layer[layer - 1].attention.output.dense, model.bert.encoder.layer[layer - 1].output.dense):
            part.weight.data *= 1e-3
            part.bias.data *= 1e-3
    similarities = measure_contribution(model, [batch])["layers"]
    threshold = sorted(similarities)[-3] + 1e-4
    by_threshold = drop_layers(tiny_copy(model), strategy="contribution", threshold=threshold, batches=[batch])
    by_number = drop_layers(tiny_copy(model), strategy="contribution", num_layers_to_drop=2, batches=[batch])
    for drop in (by_threshold, by_number):
        assert drop.stacks["layers"].dropped == (2, 5)
        assert drop.stacks["layers"].similarities == pytest.approx(similarities)


def tiny_copy(model: PreTrainedModel) -> PreTrainedModel:
    copied = type(model)(model.config.__class__.from_dict(model.config.to_dict()))
    copied.load_state_dict(model.state_dict())
    return copied.eval()


def test_the_same_contribution_request_is_recognised_without_examples() -> None:
    model = tiny_model("bert")
    drop_layers(model, strategy="contribution", num_layers_to_drop=2, batches=[tiny_batch(model)])
    assert drop_layers(model, strategy="contribution", num_layers_to_drop=2).already_done
    with pytest.raises(LayerDropError, match="another drop"):
        drop_layers(model, strategy="contribution")


@pytest.mark.parametrize("architecture", ["t5", "modernbert", "deberta-v2-conv"])
def test_a_layer_that_has_to_stay_is_no_candidate(architecture: str) -> None:
    model = tiny_model(architecture, num_layers=3)
    drop = drop_layers(model, strategy="contribution", num_layers_to_drop=2, batches=[tiny_batch(model)])
    assert all(stack.kept == (1,) for stack in drop.stacks.values())
    with pytest.raises(LayerDropError, match="has to keep at least 1"):
        drop_layers(tiny_model(architecture, num_layers=3), strategy="contribution", num_layers_to_drop=3, batches=[tiny_batch(model)])
