"""Distillation under DeepSpeed's ZeRO, two real processes on the CPU: what `tests/deepspeed_job.py` noted."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.deepspeed_launch import job

EXPORTED = {"predicts otherwise by": 0.0, "layers": 2, "loading": [], "stored": []}


def is_exported(found: dict[str, Any], *, projections: bool) -> bool:
    assert ("distill_projections.safetensors" in found["files"]) == projections
    return {key: found[key] for key in EXPORTED} == EXPORTED


@pytest.mark.slow
def test_every_feature_under_zero_2_and_3(tmp_path: Path) -> None:
    everywhere = ("half_precision", "phases", "resume", "loaded_after_the_config")
    found = job(
        tmp_path, *(f"{name}:{each}" for each in everywhere for name in ("zero2", "zero3")), "zero3:handed_over", "zero3:asked_when_missing"
    )
    for name in ("zero2", "zero3"):
        phases = found[f"{name}:phases"]
        assert phases["moved"] == [] and len(phases["losses"]) == 4
        assert phases["losses"][1] < phases["losses"][0] and phases["losses"][3] < phases["losses"][2]
        assert is_exported(phases["exported"], projections=True)

        resume = found[f"{name}:resume"]
        assert resume["differs by"] == 0.0
        assert resume["projections"] and not any("projections" in key for key in resume["in model"])

        ways = found[f"{name}:loaded_after_the_config"]
        assert {way: each["student was split"] for way, each in ways.items()} == dict.fromkeys(ways, name == "zero3")
        teachers = {"live": "whole", "built": "whole", "stored": "on disk", **({"split": "split"} if name == "zero3" else {})}
        assert {way: each["teacher"] for way, each in ways.items()} == teachers
        for way in ways.values():
            assert way["losses"] == pytest.approx(ways["live"]["losses"], rel=1e-6)
            assert way["evaluated"] == pytest.approx(ways["live"]["evaluated"], rel=1e-6)
            assert is_exported(way["exported"], projections=False)

        half = found[f"{name}:half_precision"]
        assert half["types"] == ["torch.bfloat16"] and half["losses"][1] < half["losses"][0]

    asked = found["zero3:asked_when_missing"]
    assert len(asked["half"]) == 2 and asked["whole"] == pytest.approx(asked["live"], rel=1e-6)
    handed = found["zero3:handed_over"]
    assert handed["student"]["losses"] == pytest.approx(handed["student of a path"]["losses"], rel=1e-6)
    for way, each in handed.items():
        assert is_exported(each["exported"], projections=way == "teacher")
    live = {name: found[f"{name}:loaded_after_the_config"]["live"] for name in ("zero2", "zero3")}
    assert live["zero2"]["losses"] == pytest.approx(live["zero3"]["losses"], rel=1e-6)
