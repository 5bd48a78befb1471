from __future__ import annotations

import copy
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import BertForSequenceClassification, LongformerConfig, LongformerModel, PreTrainedModel

from hf_compress.errors import LayerDropError
from hf_compress.layers.drop import drop_layers
from hf_compress.layers.record import KeptLayers, recorded_drop
from hf_compress.layers.stack import find_stacks
from tests.tiny_models import BERT_LIKE, tiny_batch, tiny_model


def untouched(model: PreTrainedModel, before: PreTrainedModel) -> bool:
    old, new = before.state_dict(), model.state_dict()
    same = old.keys() == new.keys() and all(torch.equal(old[name], new[name]) for name in old)
    return same and model.config.to_dict() == before.config.to_dict()


@torch.no_grad()
def plain_loop(model: BertForSequenceClassification, layers: list[int], batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """BERT written out, with these layers only."""
    mask = (1.0 - batch["attention_mask"][:, None, None, :].float()) * torch.finfo(torch.float32).min
    hidden = model.bert.embeddings(input_ids=batch["input_ids"])
    for layer in layers:
        hidden = model.bert.encoder.layer[layer - 1](hidden, mask)
        hidden = hidden if isinstance(hidden, torch.Tensor) else hidden[0]
    assert model.bert.pooler is not None
    logits: torch.Tensor = model.classifier(model.bert.pooler(hidden))
    return logits


def test_bert_by_a_loop_written_out() -> None:
    model: Any = tiny_model("bert", num_layers=6)
    batch = tiny_batch(model)
    expected = plain_loop(model, [1, 2, 5, 6], batch)
    drop_layers(model, strategy="symmetric", num_layers_to_drop=2)
    with torch.no_grad():
        torch.testing.assert_close(model(**batch).logits, expected, rtol=0, atol=1e-6)


def test_what_comes_back_and_what_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    model = tiny_model("bert", num_layers=12)
    with caplog.at_level(logging.INFO, "hf_compress"):
        drop = drop_layers(model, strategy="symmetric")
    assert caplog.messages == ["kept 1-4 and 9-12 of 12, dropped 5-8"]
    assert drop.strategy == "symmetric"
    assert not drop.already_done
    stack = drop.stacks["layers"]
    assert (stack.kept, stack.dropped, stack.num_layers, stack.similarities) == ((1, 2, 3, 4, 9, 10, 11, 12), (5, 6, 7, 8), 12, None)
    assert recorded_drop(model.config) == {"layers": KeptLayers(stack.kept, 12, (("strategy", "symmetric"),))}


def test_layers_named_one_by_one() -> None:
    for request in ({"layers_to_drop": [6, 2]}, {"layers_to_keep": [5, 4, 3, 1]}):
        drop = drop_layers(tiny_model("bert", num_layers=6), **request)  # type: ignore[arg-type]
        assert drop.stacks["layers"].kept == (1, 3, 4, 5)
        assert drop.strategy is None


@pytest.mark.parametrize(
    ("request_", "words"),
    [
        ({}, "Nothing says which layers"),
        ({"num_layers_to_drop": 2}, r"only num_layers_to_drop is given.*such as 'top'"),
        ({"threshold": 0.9}, r"only threshold is given.*such as 'contribution'"),
        ({"strategy": "symetric"}, "Did you mean 'symmetric'"),
        ({"strategy": "top", "layers_to_drop": [1]}, "strategy and layers_to_drop are given together"),
        ({"layers_to_keep": [1], "layers_to_drop": [2]}, "layers_to_drop and layers_to_keep are given together"),
        ({"layers_to_drop": [2], "num_layers_to_drop": 1}, "named one by one"),
        ({"strategy": "top", "num_layers_to_drop": 0}, "at least 1"),
        ({"strategy": "top", "num_layers_to_drop": 6}, "has 6 layers and has to keep at least 1"),
        ({"strategy": "alternate", "num_layers_to_drop": 4}, "3 of 6 at most"),
        ({"strategy": "top", "threshold": 0.9}, "only the strategy 'contribution'"),
        ({"strategy": "contribution", "threshold": 0.9, "num_layers_to_drop": 2}, "given together"),
        ({"strategy": "contribution", "threshold": 95}, "between 0 and 1"),
        ({"strategy": "contribution"}, "measures the layers on examples"),
        ({"layers_to_drop": [0]}, "counted from 1"),
        ({"layers_to_drop": [3, 3]}, "twice"),
        ({"layers_to_drop": [7]}, "layers are 1 to 6"),
        ({"layers_to_drop": []}, "is empty"),
        ({"layers_to_drop": [1, 2, 3, 4, 5, 6]}, "at least 1 has to stay"),
        ({"layers_to_keep": [1, 2, 3, 4, 5, 6]}, "none would be dropped"),
        ({"strategy": "top", "stack": "decoder"}, "has 'layers'"),
    ],
)
def test_refused_before_anything_is_changed(request_: dict[str, Any], words: str) -> None:
    model = tiny_model("bert", num_layers=6)
    before = copy.deepcopy(model)
    with pytest.raises(LayerDropError, match=words):
        drop_layers(model, **request_)
    assert untouched(model, before)


@pytest.mark.parametrize("architecture", ["modernbert", "t5", "deberta-v2-conv"])
def test_a_first_layer_that_has_to_stay(architecture: str) -> None:
    model = tiny_model(architecture)
    before = copy.deepcopy(model)
    with pytest.raises(LayerDropError, match=r"Layer 1 .*has to stay"):
        drop_layers(model, layers_to_drop=[1, 3])
    assert untouched(model, before)


def test_a_config_that_does_not_follow() -> None:
    config = LongformerConfig(**{**BERT_LIKE, "vocab_size": 50, "num_hidden_layers": 3, "attention_window": [4, 4, 4]})
    model = LongformerModel(config)
    before = copy.deepcopy(model)
    with pytest.raises(LayerDropError, match=r"cannot be built from a config with fewer layers.*attention_window"):
        drop_layers(model, strategy="top")
    assert untouched(model, before)


def test_an_error_names_the_stack_it_is_about() -> None:
    model = tiny_model("t5", num_layers=6, num_decoder_layers=3)
    with pytest.raises(LayerDropError, match=r"In the decoder: num_layers_to_drop is 3, but the model has 3 layers"):
        drop_layers(model, strategy="top", num_layers_to_drop=3)
    assert drop_layers(model, strategy="top", num_layers_to_drop=3, stack="encoder").stacks["encoder"].kept == (1, 2, 3)


def test_a_layer_that_divides_by_its_number() -> None:
    model = tiny_model("gpt2", scale_attn_by_inverse_layer_idx=True)
    before = copy.deepcopy(model)
    with pytest.raises(LayerDropError, match=r"layer 4 would become layer 3.*scaling"):
        drop_layers(model, layers_to_drop=[3])
    assert untouched(model, before)
    assert drop_layers(model, strategy="top").stacks["layers"].kept == (1, 2, 3)


def test_the_same_request_again_changes_nothing(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    model = tiny_model("bert", num_layers=6)
    drop_layers(model, strategy="top")
    model.save_pretrained(tmp_path)
    reloaded = BertForSequenceClassification.from_pretrained(tmp_path)
    before = copy.deepcopy(reloaded)
    for request in (
        {"strategy": "top"},
        {"strategy": "top", "num_layers_to_drop": 2},
        {"layers_to_drop": [5, 6]},
        {"layers_to_keep": [1, 2, 3, 4]},
    ):
        caplog.clear()
        with caplog.at_level(logging.INFO, "hf_compress"):
            again = drop_layers(reloaded, **request)  # type: ignore[arg-type]
        assert again.already_done
        assert again.stacks["layers"].kept == (1, 2, 3, 4)
        assert len(caplog.messages) == 1
        assert "kept 1-4 of 6" in caplog.messages[0]
        assert untouched(reloaded, before)


@pytest.mark.parametrize(
    "request_",
    [{"strategy": "bottom"}, {"strategy": "top", "num_layers_to_drop": 1}, {"layers_to_drop": [1]}, {"strategy": "contribution"}],
)
def test_another_drop_of_a_dropped_model(request_: dict[str, Any]) -> None:
    model = tiny_model("bert", num_layers=6)
    drop_layers(model, strategy="top")
    before = copy.deepcopy(model)
    with pytest.raises(LayerDropError, match=r"already \(kept 1-4 of 6\)"):
        drop_layers(model, **request_, batches=[tiny_batch(model)])
    assert untouched(model, before)


def test_places_that_layers_remember() -> None:
    model: Any = tiny_model("llama", num_layers=4)
    drop_layers(model, layers_to_drop=[2])
    assert [layer.self_attn.layer_idx for layer in model.model.layers] == [0, 1, 2]
    model = tiny_model("xlnet", num_layers=4)
    drop_layers(model, layers_to_drop=[2])
    assert model.transformer.n_layer == model.config.n_layer == 3
    model = tiny_model("distilbert", num_layers=4)
    drop_layers(model, layers_to_drop=[2])
    assert model.distilbert.transformer.n_layers == model.config.num_hidden_layers == 3


def test_lists_with_one_entry_a_layer() -> None:
    types = ["full_attention", "sliding_attention", "sliding_attention", "full_attention"]
    for architecture in ("qwen3", "modernbert"):
        model: Any = tiny_model(architecture, layer_types=types)
        drop_layers(model, layers_to_drop=[3])
        assert model.config.layer_types == [types[0], types[1], types[3]]
        model.config.validate()


@pytest.mark.parametrize("architecture", ["gpt2", "llama", "qwen3", "t5", "bart"])
def test_generation_with_a_cache(architecture: str) -> None:
    model: Any = tiny_model(architecture, num_layers=4, head="seq2seq_lm" if architecture in ("t5", "bart") else "causal_lm")
    drop_layers(model, layers_to_drop=[2, 3])
    inputs = torch.tensor([[5, 6, 7, 8]])
    words = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False}
    assert torch.equal(model.generate(inputs, use_cache=True, **words), model.generate(inputs, use_cache=False, **words))


@pytest.mark.parametrize("stack", ["encoder", "decoder", "both"])
@pytest.mark.parametrize("architecture", ["t5", "bart"])
def test_one_stack_or_both(architecture: str, stack: str, tmp_path: Path) -> None:
    model = tiny_model(architecture, num_layers=4)
    drop = drop_layers(model, strategy="top", num_layers_to_drop=2, stack=stack)
    depths = {name: 2 if stack in (name, "both") else 4 for name in ("encoder", "decoder")}
    assert {name: found.depth for name, found in find_stacks(model).items()} == depths
    assert set(drop.stacks) == ({"encoder", "decoder"} if stack == "both" else {stack})
    model.save_pretrained(tmp_path)
    reloaded = type(model).from_pretrained(tmp_path)
    with torch.no_grad():
        assert torch.equal(model(**tiny_batch(model)).logits, reloaded(**tiny_batch(model)).logits)


def test_one_stack_after_the_other() -> None:
    model = tiny_model("bart", num_layers=4)
    drop_layers(model, strategy="top", stack="encoder")
    with pytest.raises(LayerDropError, match="encoder: kept 1-3 of 4"):
        drop_layers(model, strategy="top")
    drop_layers(model, strategy="bottom", stack="decoder")
    assert drop_layers(model, strategy="top", stack="encoder").already_done
    recorded = recorded_drop(model.config)
    assert recorded is not None
    assert {name: kept.kept for name, kept in recorded.items()} == {"encoder": (1, 2, 3), "decoder": (2, 3, 4)}


def test_stacks_of_different_depths_are_cut_by_their_own() -> None:
    model = tiny_model("t5", num_layers=6, num_decoder_layers=3)
    assert str(drop_layers(model, strategy="top")) == "encoder: kept 1-4 of 6, dropped 5-6; decoder: kept 1-2 of 3, dropped 3"


def test_shared_layers_in_groups() -> None:
    model = tiny_model("albert", num_layers=6, num_hidden_groups=2)
    before = copy.deepcopy(model)
    with pytest.raises(LayerDropError, match="shares its layers in 2 groups"):
        drop_layers(model, layers_to_drop=[1, 2])
    assert untouched(model, before)
    drop_layers(model, strategy="symmetric")
    assert model.config.num_hidden_layers == 4
    assert sum(parameter.numel() for parameter in model.parameters()) == sum(parameter.numel() for parameter in before.parameters())


def test_hidden_states_after_a_forward_that_came_before() -> None:
    model = tiny_model("bert", num_layers=4)
    with torch.no_grad():
        before = model(**tiny_batch(model), output_hidden_states=True).hidden_states
        drop_layers(model, strategy="top", num_layers_to_drop=2)
        after = model(**tiny_batch(model), output_hidden_states=True).hidden_states
    assert len(after) == 3
    assert all(torch.equal(one, other) for one, other in zip(after, before, strict=False))


def test_random_numbers_stay_where_they_were() -> None:
    model = tiny_model("bert")
    torch.manual_seed(7)
    expected = torch.rand(3)
    torch.manual_seed(7)
    drop_layers(model, strategy="top")
    assert torch.equal(torch.rand(3), expected)


def test_a_model_inside_another_module() -> None:
    class Classifier(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = tiny_model("bert", num_layers=4)

    model = Classifier()
    drop_layers(model, strategy="top", num_layers_to_drop=2)
    assert len(model.body.bert.encoder.layer) == model.body.config.num_hidden_layers == 2


@pytest.mark.parametrize("name", ["layers_to_drop", "layers_to_keep"])
@pytest.mark.parametrize("layers", ["5-6", 5])
def test_layers_in_python_are_lists_of_numbers(name: str, layers: Any) -> None:
    with pytest.raises(LayerDropError, match=rf"{name} is '?5.*in Python it is a list of numbers, such as {name}=\[5, 6\]"):
        drop_layers(tiny_model("bert", num_layers=6), **{name: layers})


def test_a_path_is_no_model() -> None:
    with pytest.raises(LayerDropError, match=r"takes a model, and found 'bert-base-uncased'.*hf-compress drop MODEL"):
        drop_layers("bert-base-uncased", strategy="top")  # type: ignore[arg-type]
