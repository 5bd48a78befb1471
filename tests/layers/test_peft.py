from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import AutoPeftModelForSequenceClassification, PeftModel, PrefixTuningConfig, TaskType, get_peft_model
from transformers import AutoModelForSequenceClassification, PreTrainedModel

from hf_compress.errors import LayerDropError
from hf_compress.layers.drop import drop_layers
from hf_compress.layers.peft import save_dropped_base
from hf_compress.layers.record import recorded_drop
from tests.tiny_models import tiny_batch, tiny_model
from tests.tiny_models import with_lora as lora


def with_lora(model: PreTrainedModel, **config: Any) -> Any:
    """On a classifier."""
    return lora(model, **{"task_type": TaskType.SEQ_CLS, "target_modules": ["query", "dense"], **config})


@torch.no_grad()
def logits(model: Any, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    return model.eval()(**batch).logits


@pytest.mark.parametrize("architecture", ["bert", "albert", "distilbert"])
def test_the_dropped_base_is_saved_beside_the_adapter(architecture: str, tmp_path: Path) -> None:
    modules = ["q_lin", "lin1"] if architecture == "distilbert" else ["query"]
    model = with_lora(tiny_model(architecture, num_layers=6), target_modules=modules)
    drop = drop_layers(model, strategy="symmetric")
    assert drop.stacks["layers"].kept == (1, 2, 5, 6)
    batch = tiny_batch(model)
    expected = logits(model, batch)
    folder = save_dropped_base(model, tmp_path)
    model.save_pretrained(tmp_path)
    assert folder == tmp_path / "base_model"

    loaded = AutoPeftModelForSequenceClassification.from_pretrained(tmp_path)
    torch.testing.assert_close(logits(loaded, batch), expected, rtol=0, atol=1e-6)
    base = AutoModelForSequenceClassification.from_pretrained(folder)
    recorded = recorded_drop(base.config)
    assert recorded is not None
    assert recorded["layers"].kept == (1, 2, 5, 6)
    assert not any("lora" in name or "base_layer" in name for name in base.state_dict())
    with model.disable_adapter():
        torch.testing.assert_close(logits(base, batch)[:, 0].shape, logits(model, batch)[:, 0].shape)
    torch.testing.assert_close(logits(PeftModel.from_pretrained(base, tmp_path), batch), expected, rtol=0, atol=1e-6)


def test_a_tied_base_is_whole(tmp_path: Path) -> None:
    model = with_lora(tiny_model("bert", num_layers=3, head="masked_lm"), task_type=None, target_modules=["query"])
    drop_layers(model, strategy="top")
    batch = tiny_batch(model)
    base = type(model.get_base_model()).from_pretrained(save_dropped_base(model, tmp_path))
    with model.disable_adapter():
        torch.testing.assert_close(logits(base, batch), logits(model, batch), rtol=0, atol=1e-6)


def test_without_the_base_the_adapter_loads_nowhere_in_silence(tmp_path: Path) -> None:
    tiny_model("bert", num_layers=6).save_pretrained(tmp_path / "full")
    model = with_lora(AutoModelForSequenceClassification.from_pretrained(tmp_path / "full"))
    assert model.peft_config["default"].base_model_name_or_path == str(tmp_path / "full")
    drop_layers(model, strategy="top")
    model.save_pretrained(tmp_path / "adapter")
    written = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert "save_dropped_base" in written["base_model_name_or_path"]
    with pytest.raises(OSError, match="save_dropped_base"):
        AutoPeftModelForSequenceClassification.from_pretrained(tmp_path / "adapter")


def test_layers_to_transform_follow_their_layers(tmp_path: Path) -> None:
    model = with_lora(tiny_model("bert", num_layers=6), target_modules=["query"], layers_to_transform=[0, 2, 4], layers_pattern="layer")
    drop_layers(model, layers_to_drop=[1, 4])
    assert model.peft_config["default"].layers_to_transform == [1, 2]
    batch = tiny_batch(model)
    expected = logits(model, batch)
    save_dropped_base(model, tmp_path)
    model.save_pretrained(tmp_path)
    loaded = AutoPeftModelForSequenceClassification.from_pretrained(tmp_path)
    torch.testing.assert_close(logits(loaded, batch), expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"layers_to_transform": [4, 5], "layers_pattern": "layer", "target_modules": ["query"]}, "only in layers that are to be dropped"),
        ({"target_modules": r".*layer\.(0|5)\..*query"}, "names layers by number in target_modules"),
        ({"target_modules": ["encoder.layer.1.attention.self.query", "key"]}, "names layers by number in target_modules"),
        ({"rank_pattern": {"layer.2.attention.self.query": 4}}, "names layers by number in rank_pattern"),
    ],
)
def test_adapters_that_count_layers(config: dict[str, Any], words: str) -> None:
    model = with_lora(tiny_model("bert", num_layers=6), **config)
    with pytest.raises(LayerDropError, match=words):
        drop_layers(model, strategy="top")
    assert len(model.get_base_model().bert.encoder.layer) == model.config.num_hidden_layers == 6
    assert recorded_drop(model.config) is None


def test_prompts_for_each_layer() -> None:
    config = PrefixTuningConfig(task_type=TaskType.SEQ_CLS, num_virtual_tokens=2)
    model: Any = get_peft_model(tiny_model("bert", num_layers=4), config)
    with pytest.raises(LayerDropError, match="prompt for each layer"):
        drop_layers(model, strategy="top")
    assert model.config.num_hidden_layers == 4


def test_a_model_without_adapters() -> None:
    with pytest.raises(LayerDropError, match="has no adapters"):
        save_dropped_base(tiny_model("bert"), "nowhere")
