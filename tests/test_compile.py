"""torch.compile: hooks are traced into the graph, and what is trained is what would be trained without it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch._dynamo.utils import counters

from hf_compress.adapter_off import AdapterOffTeacher
from hf_compress.arguments import CompressionArguments
from hf_compress.losses.hidden_states import HiddenStatesLoss
from hf_compress.losses.labels import LabelsLoss
from hf_compress.losses.logits import LogitsLoss
from hf_compress.trainer import DistillTrainer
from tests.cached_runs import MAP, cached
from tests.tiny_models import tiny_model
from tests.tiny_runs import NARROW, arguments, every_loss, largest_difference, rows, student, teacher, trained, weights

# aot_eager traces forward and backward as inductor does, and compiles no C++ for minutes.
COMPILED: dict[str, Any] = {"torch_compile": True, "torch_compile_backend": "aot_eager"}


def phased(folder: Path, **more: Any) -> DistillTrainer:
    """Other hooks in each phase."""
    flags = CompressionArguments(distill_phases="prediction=1,intermediate=1")
    return trained(folder, every_loss(), compression=flags, max_steps=-1, learning_rate=0.05, per_device_train_batch_size=8, **more)


def checkpointed(folder: Path, **more: Any) -> DistillTrainer:
    return trained(folder, every_loss(), gradient_checkpointing=True, learning_rate=0.05, **more)


def from_disk(folder: Path, **more: Any) -> DistillTrainer:
    """Hidden states at tokens that change from batch to batch."""
    losses = [LogitsLoss(), HiddenStatesLoss(MAP)]
    return cached(folder, student(**NARROW), teacher(), losses=losses, max_steps=2, hidden_states_selection="2l_3t_0.5h", **more)


def adapter_off(folder: Path, **more: Any) -> DistillTrainer:
    """The same modules are called twice a step, compiled with adapters and plainly without; and there is an evaluation between."""
    torch.manual_seed(5)
    model = get_peft_model(tiny_model("bert", num_layers=2), LoraConfig(task_type="SEQ_CLS", target_modules=["query", "dense"], r=2))
    losses = [LogitsLoss(), HiddenStatesLoss(), LabelsLoss()]
    args = arguments(folder, max_steps=2, per_device_train_batch_size=8, learning_rate=0.5, eval_strategy="steps", eval_steps=1, **more)
    data = {"train_dataset": rows(), "eval_dataset": rows(count=4)}
    trainer = DistillTrainer(model, args, teacher=AdapterOffTeacher(model), losses=losses, **data)
    trainer.train()
    return trainer


@pytest.mark.slow
@pytest.mark.parametrize("run", [phased, checkpointed, from_disk, adapter_off])
def test_compiled_as_plain(run: Any, tmp_path: Path) -> None:
    plain = run(tmp_path / "plain")
    torch._dynamo.reset()
    counters.clear()
    compiled = run(tmp_path / "compiled", **COMPILED)
    assert largest_difference(weights(plain), weights(compiled)) < 1e-6
    losses = [[entry[name] for entry in trainer.state.log_history for name in entry if "loss" in name] for trainer in (plain, compiled)]
    assert len(losses[0]) > 1 and losses[1] == pytest.approx(losses[0], rel=1e-5, abs=1e-7)
    assert counters["stats"]["unique_graphs"] >= (3 if run is phased else 1)  # two lengths in the first phase, and the second phase's own
    if run is not checkpointed:  # there the layers run plainly: recording in a checkpointed part breaks the graph
        assert not counters["graph_break"]
    assert isinstance(compiled.model_wrapped, torch._dynamo.eval_frame.OptimizedModule)
