from __future__ import annotations

import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from peft import AutoPeftModelForCausalLM
from transformers import AutoModelForCausalLM, PreTrainedModel

from hf_compress.errors import LayerDropError
from hf_compress.layers.adapter_base import load_with_adapters, refuse_other_base
from hf_compress.layers.checkpoint import recorded_in_checkpoint, refuse_other_layers
from hf_compress.layers.drop import drop_layers
from hf_compress.layers.peft import base_of, holds_adapter, save_dropped_base
from hf_compress.layers.record import recorded_drop
from tests.tiny_models import tiny_batch, tiny_model
from tests.tiny_models import with_lora as lora


def with_lora(model: PreTrainedModel) -> Any:
    """On a language model."""
    return lora(model, task_type="CAUSAL_LM", target_modules=["q_proj", "down_proj"])


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    shown: torch.Tensor = model.eval()(**tiny_batch(model)).logits
    return shown


def full(folder: Path, **config: Any) -> Any:
    tiny_model("llama", num_layers=6, head="causal_lm", **config).save_pretrained(folder / "full")
    return AutoModelForCausalLM.from_pretrained(folder / "full")


def healed(folder: Path, **drop: Any) -> Any:
    """Layers dropped first, then an adapter, as one heals; saved in `folder`/healed."""
    model = full(folder)
    drop_layers(model, **(drop or {"strategy": "symmetric"}))
    adapted = with_lora(model)
    save_dropped_base(adapted, folder / "healed")
    adapted.save_pretrained(folder / "healed")
    return adapted


def test_an_adapter_that_is_added_after_the_drop_does_not_name_the_full_base(tmp_path: Path) -> None:
    model = full(tmp_path)
    drop_layers(model, strategy="symmetric")
    with_lora(model).save_pretrained(tmp_path / "healed")
    with pytest.raises(OSError, match="save_dropped_base"):
        AutoPeftModelForCausalLM.from_pretrained(tmp_path / "healed")
    with pytest.raises(LayerDropError, match="was not saved with it"):
        load_with_adapters(tmp_path / "healed")


def test_adapter_and_base_load_together_also_from_another_place(tmp_path: Path) -> None:
    expected = logits(healed(tmp_path))
    assert torch.equal(logits(AutoPeftModelForCausalLM.from_pretrained(tmp_path / "healed")), expected)
    assert holds_adapter(tmp_path / "healed") and not holds_adapter(tmp_path / "healed" / "base_model")
    shutil.copytree(tmp_path / "healed", tmp_path / "healed" / "checkpoint-2", ignore=shutil.ignore_patterns("base_model"))
    shutil.move(tmp_path / "healed", tmp_path / "moved")
    for folder in (tmp_path / "moved", tmp_path / "moved" / "checkpoint-2"):
        assert Path(base_of(folder)) == tmp_path / "moved" / "base_model"
        assert torch.equal(logits(load_with_adapters(folder)), expected)


def test_the_merged_model_is_a_plain_one(tmp_path: Path) -> None:
    expected = logits(healed(tmp_path))
    load_with_adapters(tmp_path / "healed").merge_and_unload().save_pretrained(tmp_path / "merged")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    torch.testing.assert_close(logits(merged), expected, rtol=0, atol=1e-5)
    recorded = recorded_drop(merged.config)
    assert recorded is not None and recorded["layers"].kept == (1, 2, 5, 6)
    assert {type(module).__name__ for module in merged.modules()} == {type(each).__name__ for each in full(tmp_path).modules()}
    assert not holds_adapter(tmp_path / "merged")


def test_another_base_is_refused(tmp_path: Path) -> None:
    adapted = healed(tmp_path)
    folder = tmp_path / "healed"
    other = full(tmp_path)
    before = {name: tensor.clone() for name, tensor in other.state_dict().items()}
    with pytest.raises(LayerDropError, match=r"kept layers 1-2 and 5-6 of 6 .*LlamaForCausalLM has lost no layers.*load_with_adapters"):
        load_with_adapters(folder, base=other)
    drop_layers(other, strategy="top")
    with pytest.raises(LayerDropError, match=r"kept layers 1-4 of 6"):
        refuse_other_base(other, folder)
    assert before.keys() > other.state_dict().keys() and not any("lora" in name for name in other.state_dict())

    own = full(tmp_path)
    drop_layers(own, strategy="symmetric")
    assert torch.equal(logits(load_with_adapters(folder, base=own)), logits(adapted))


def test_without_a_record_the_adapters_own_weights_tell(tmp_path: Path) -> None:
    healed(tmp_path)
    folder = tmp_path / "healed"
    shutil.rmtree(folder / "base_model")
    said = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps({**said, "base_model_name_or_path": None}))
    with pytest.raises(LayerDropError, match="names no base"):
        load_with_adapters(folder)
    deeper = full(tmp_path)
    with pytest.raises(LayerDropError, match=r"no weights for 8 parts of this LlamaForCausalLM.*layers\.4"):
        load_with_adapters(folder, base=deeper)
    assert not any("lora" in name for name in deeper.state_dict())
    with pytest.raises(LayerDropError, match="trained on 4 layers or more, and this LlamaForCausalLM has 2"):
        load_with_adapters(folder, base=tiny_model("llama", num_layers=2, head="causal_lm"))
    with pytest.raises(LayerDropError, match=r"adapts model\.layers\.0\..*GPT2LMHeadModel has no such part"):
        load_with_adapters(folder, base=tiny_model("gpt2", head="causal_lm"))


def test_what_is_no_adapter(tmp_path: Path) -> None:
    full(tmp_path)
    with pytest.raises(LayerDropError, match=r"no adapter_config\.json"):
        load_with_adapters(tmp_path / "full")


def test_a_base_that_other_adapters_need_is_not_overwritten(tmp_path: Path) -> None:
    healed(tmp_path)
    other = full(tmp_path)
    drop_layers(other, strategy="top")
    with pytest.raises(LayerDropError, match=r"holds the base of .* kept layers 1-2 and 5-6 of 6, and this one kept layers 1-4 of 6"):
        save_dropped_base(with_lora(other), tmp_path / "healed")
    save_dropped_base(healed(tmp_path), tmp_path / "healed")  # the same layers


def test_a_checkpoint_of_adapters_says_which_layers_its_base_kept(tmp_path: Path) -> None:
    """So that a choice that was measured is taken over, and adapters do not get onto other layers."""
    healed(tmp_path, layers_to_keep=[1, 2, 4, 6])
    folder = str(tmp_path / "healed")
    recorded = recorded_in_checkpoint(SimpleNamespace(resume_from_checkpoint=folder))
    assert recorded is not None and recorded["layers"].kept == (1, 2, 4, 6)
    refuse_other_layers(folder, healed(tmp_path / "same", layers_to_keep=[1, 2, 4, 6]))
    with pytest.raises(LayerDropError, match=r"kept layers 1-2, 4 and 6 of 6, and the model of this run kept layers 1-4 of 6"):
        refuse_other_layers(folder, healed(tmp_path / "other", strategy="top"))
