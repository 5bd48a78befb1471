"""The healing example, in seconds: a small Llama that has barely learnt, and a few steps of LoRA."""

from __future__ import annotations

import importlib
from pathlib import Path
from types import ModuleType

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from hf_compress.errors import LayerDropError
from hf_compress.layers.adapter_base import load_with_adapters
from hf_compress.layers.record import recorded_drop

FOLDER = Path(__file__).parents[2] / "examples"
QUICK = ["--use_cpu", "--save_strategy", "no", "--report_to", "none", "--block_size", "32", "--learning_rate", "0.01"]


@pytest.fixture
def example(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(FOLDER))
    return importlib.import_module("heal_llama")


def test_drop_heal_save_load_and_write(example: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "healed"
    found = example.main(["--output_dir", str(out), "--small_model_steps", "25", "--max_steps", "8", "--merge", *QUICK])
    assert found["healed"] < 0.97 * found["dropped"]
    assert found["loaded"] == pytest.approx(found["healed"], rel=1e-5)
    assert "the room was" in capsys.readouterr().out

    card = (out / "README.md").read_text()
    assert "kept 1-5 and 8 of 8" in card and str(tmp_path) not in card.split("# healed")[0]

    merged = AutoModelForCausalLM.from_pretrained(out / "merged")
    recorded = recorded_drop(merged.config)
    assert recorded is not None and recorded["layers"].kept == (1, 2, 3, 4, 5, 8)
    batch = {"input_ids": torch.tensor([[5, 9, 14, 20]])}
    with torch.no_grad():
        torch.testing.assert_close(merged(**batch).logits, load_with_adapters(out)(**batch).logits, rtol=0, atol=1e-4)
    with pytest.raises(LayerDropError, match="has lost no layers"):
        load_with_adapters(out, base=AutoModelForCausalLM.from_pretrained(out / "whole"))


def test_a_named_model_healed_by_its_whole_self(example: ModuleType, tmp_path: Path) -> None:
    whole = example.small_llama(tmp_path / "whole", example.HealArguments(small_model_steps=1, block_size=32), 0)[0]
    text = tmp_path / "text.txt"
    text.write_text("\n".join(f"the room was clean and the bed was warm {number}" for number in range(40)))
    named = ["--model_name_or_path", whole, "--train_file", str(text), "--output_dir", str(tmp_path / "healed")]
    choice = ["--layer_drop_strategy", "contribution", "--num_layers_to_drop", "3", "--lora_target_modules", "all-linear"]
    found = example.main([*named, *choice, "--distill", "--max_steps", "3", *QUICK])
    assert found["loaded"] == pytest.approx(found["healed"], rel=1e-5) and found["healed"] != pytest.approx(found["dropped"], rel=1e-3)
    assert load_with_adapters(tmp_path / "healed").config.num_hidden_layers == 5
    assert AutoTokenizer.from_pretrained(tmp_path / "healed").vocab_size > 100
    with pytest.raises(SystemExit, match="--train_file"):
        example.main(["--model_name_or_path", whole, "--output_dir", str(tmp_path / "no")])
