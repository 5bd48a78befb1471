"""Two gloo processes of 8 give the step that one process of 16 gives: counts are gathered, gradients averaged, nothing scaled twice."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.launching import launch

SCRIPT = """
import json, os, sys
import torch
from safetensors.torch import save_file
from hf_compress import CompressionArguments, DistillTrainer
from hf_compress.losses.recipes import losses_of
from tests.tiny_models import tiny_model
from tests.tiny_runs import NARROW, arguments, rows, student, teacher, every_loss, every_objective
from pathlib import Path

folder, batch_size, accumulation, phases = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), sys.argv[4]
several = sys.argv[5] == "several teachers"
chosen = {"every_loss": every_loss, "every_objective": every_objective, "several teachers": every_loss}
guides = [teacher(), tiny_model("bert", num_layers=3, seed=9)] if several else teacher()
alone = lambda: losses_of(sys.argv[5], weights={"logits": 0} if sys.argv[5] == "minilmv2" else None)
losses = chosen.get(sys.argv[5], alone)()
torch.manual_seed(5)
args = arguments(folder, per_device_train_batch_size=batch_size, gradient_accumulation_steps=accumulation,
                 **({"max_steps": -1} if phases else {"max_steps": 2}), gradient_checkpointing=sys.argv[5] not in chosen)
flags = CompressionArguments(distill_phases=phases, distill_progressive=sys.argv[5] == "mobilebert") if phases else None
if several:  # the first from disk, the second live
    flags = CompressionArguments(teacher_cache_dir=f"{folder}/cache,", teacher_cache_dtype="float32", teacher_weights="2,1")
trainer = DistillTrainer(student(**NARROW), args, teacher=guides, losses=losses, compression=flags, train_dataset=rows())
trainer.train()
if trainer.is_world_process_zero():
    save_file({name: p.detach().clone() for name, p in trainer.model.named_parameters()}, folder / "weights.safetensors")
    (folder / "log.json").write_text(json.dumps(trainer.state.log_history))
"""


def run(
    tmp_path: Path, name: str, processes: int, batch_size: int, accumulation: int = 1, phases: str = "", losses: str = "every_loss"
) -> tuple[dict[str, torch.Tensor], list[dict[str, float]]]:
    folder = tmp_path / name
    folder.mkdir()
    launch(folder, SCRIPT, str(batch_size), str(accumulation), phases, losses, processes=processes)
    return load_file(folder / "weights.safetensors"), json.loads((folder / "log.json").read_text())


@pytest.mark.slow
@pytest.mark.parametrize("losses", ["every_loss", "every_objective"])
@pytest.mark.parametrize("phases", ["", "intermediate=1,prediction=1"])
def test_two_processes_and_accumulation_step_as_one_process_does(tmp_path: Path, phases: str, losses: str) -> None:
    one, log = run(tmp_path, "one", 1, 16, phases=phases, losses=losses)
    two, log_of_two = run(tmp_path, "two", 2, 8, phases=phases, losses=losses)
    four, _ = run(tmp_path, "four", 2, 4, 2, phases=phases, losses=losses)
    assert log[0]["loss"] > 0.01 and log[0]["grad_norm"] > 0.01
    for name in one:
        assert torch.allclose(one[name], two[name], atol=1e-5), name
        assert torch.allclose(one[name], four[name], atol=1e-5), name
    for key in log[0]:
        if key.startswith("loss"):
            assert log_of_two[0][key] == pytest.approx(log[0][key], rel=1e-4), key


@pytest.mark.slow
def test_several_teachers_in_two_processes(tmp_path: Path) -> None:
    one, log = run(tmp_path, "one", 1, 16, losses="several teachers")
    two, log_of_two = run(tmp_path, "two", 2, 8, losses="several teachers")
    for name in one:
        assert torch.allclose(one[name], two[name], atol=1e-5), name
    parts = [key for key in log[0] if key.startswith("loss_")]
    assert "loss_hidden_states_teacher_1" in parts and "loss_attention_scores_teacher_2" in parts
    assert [log_of_two[1][key] for key in parts] == pytest.approx([log[1][key] for key in parts], rel=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("losses", "phases"),
    [
        ("minilmv2", ""),
        ("tinybert_general", ""),
        ("fitnets", "intermediate=1,prediction=1"),
        ("mobilebert", "intermediate=2,prediction=1"),
    ],
)
def test_what_no_loss_reaches_is_not_waited_for_under_gradient_checkpointing(tmp_path: Path, losses: str, phases: str) -> None:
    one, log = run(tmp_path, "one", 1, 16, phases=phases, losses=losses)
    two, _ = run(tmp_path, "two", 2, 8, phases=phases, losses=losses)
    assert log[0]["loss"] > 0 and log[0]["grad_norm"] > 0
    for name in one:
        assert torch.allclose(one[name], two[name], atol=1e-5), name
