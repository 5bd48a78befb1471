from __future__ import annotations

import json
from pathlib import Path

from transformers import AutoConfig

from hf_compress.layers.record import KeptLayers, record_drop, recorded_drop
from tests.tiny_models import tiny_config


def test_a_config_without_a_drop() -> None:
    config = tiny_config("bert")
    assert recorded_drop(config) is None
    assert recorded_drop(config.to_dict()) is None


def test_the_record_travels_with_the_config(tmp_path: Path) -> None:
    config = tiny_config("t5")
    encoder = KeptLayers((1, 2, 5), 6, (("layers_to_keep", (1, 2, 5)),))
    decoder = KeptLayers((1, 3), 4, (("num_layers_to_drop", 2), ("strategy", "alternate")))
    record_drop(config, {"encoder": encoder})
    record_drop(config, {"decoder": decoder})
    config.save_pretrained(tmp_path)
    expected = {"encoder": encoder, "decoder": decoder}
    assert recorded_drop(AutoConfig.from_pretrained(tmp_path)) == expected
    written = json.loads((tmp_path / "config.json").read_text())
    assert recorded_drop(written) == expected
    assert written["hf_compress"]["layer_drop"]["decoder"] == {
        "kept": [1, 3],
        "num_layers": 4,
        "request": {"num_layers_to_drop": 2, "strategy": "alternate"},
    }


def test_dropped_is_what_was_not_kept() -> None:
    assert KeptLayers((1, 2, 5), 6).dropped == (3, 4, 6)
