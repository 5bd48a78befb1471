"""ZeRO-1, 2 and 3 on two processes take the steps that one process takes without DeepSpeed, accumulated or not, at uneven lengths."""

from __future__ import annotations

from pathlib import Path

import pytest
from safetensors.torch import load_file

from tests.deepspeed_job import LEARNING_RATE, farthest, stepped
from tests.deepspeed_launch import job

NAMES = ("zero1", "zero2", "zero3")


@pytest.mark.slow
def test_gradients_and_weights_are_those_of_one_process(tmp_path: Path) -> None:
    found = job(tmp_path, *(f"{name}:equality" for name in NAMES))
    references = {losses: stepped(tmp_path / losses, losses, 16) for losses in ("every_loss", "every_objective")}
    for name in NAMES:
        assert found[f"{name}:equality"] == {"steps of an uneven epoch": 2}
        for layout in ("two", "accumulated", *(["objectives"] if name == "zero3" else [])):
            reference = references["every_objective" if layout == "objectives" else "every_loss"]
            start, one, end = (
                load_file(tmp_path / f"{name}_equality" / layout / f"{when}.safetensors") for when in ("start", "one", "all")
            )
            assert farthest(start, reference[0]) == 0.0
            assert farthest(one, reference[0]) > 1e-3 and farthest(end, one) > 1e-2
            # SGD's first step is the gradient times the learning rate.
            assert farthest(one, reference[1]) / LEARNING_RATE < 1e-5, (name, layout)
            assert farthest(end, reference[2]) < 1e-5, (name, layout)
