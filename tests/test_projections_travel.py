"""A projection that one run learnt is where the next one starts, as the student is."""

from __future__ import annotations

import logging
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import BertForMaskedLM, BertForSequenceClassification

from hf_compress import save_student
from hf_compress.errors import ArgumentError, TeacherError
from hf_compress.losses.hidden_states import HiddenStatesLoss
from hf_compress.projection_file import FILE_NAME, read_models, read_projections, shared_projection, write_projections
from hf_compress.projections import loaded_from
from hf_compress.students.from_teacher import student_from_teacher
from hf_compress.trainer import DistillTrainer
from tests.tiny_models import tiny_model
from tests.tiny_runs import NARROW, arguments, rows, teacher, trained

NAME = shared_projection("layers")


def first_stage(folder: Path) -> dict[str, torch.Tensor]:
    """A run that ends with `save_model`, as scripts do; what it learnt."""
    trainer = trained(folder, [HiddenStatesLoss()], max_steps=3)
    trainer.save_model()
    assert trainer.distillation is not None
    return {name: tensor.clone() for name, tensor in trainer.distillation.projections.state_dict().items()}


def second_stage(folder: Path, start: Path, losses: list[HiddenStatesLoss], guide: torch.nn.Module | None = None) -> DistillTrainer:
    model = BertForSequenceClassification.from_pretrained(start)
    return DistillTrainer(model, arguments(folder), teacher=guide or teacher(), losses=losses, train_dataset=rows())


def test_the_last_model_has_them_beside_it_and_none_inside(tmp_path: Path) -> None:
    learnt = first_stage(tmp_path)
    assert learnt.keys() == {f"{NAME}.weight", f"{NAME}.bias"}
    stored = load_file(tmp_path / FILE_NAME)
    assert stored.keys() == learnt.keys()
    assert all(torch.equal(stored[name], learnt[name]) for name in learnt)
    assert not any("projection" in name for name in load_file(tmp_path / "model.safetensors"))


def test_the_next_stage_starts_from_them(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    learnt = first_stage(tmp_path / "first")
    with caplog.at_level(logging.INFO, "hf_compress"):
        trainer = second_stage(tmp_path / "second", tmp_path / "first", [HiddenStatesLoss()])
    said = [record.getMessage() for record in caplog.records if "projection" in record.name]
    assert said == [f"projection {NAME}: starts from {FILE_NAME} in {tmp_path / 'first'}"]
    assert trainer.distillation is not None
    started = trainer.distillation.projections.state_dict()
    assert all(torch.equal(started[name], learnt[name]) for name in learnt)
    before = started[f"{NAME}.weight"].clone()
    trainer.train()
    assert not torch.equal(trainer.distillation.projections.state_dict()[f"{NAME}.weight"], before)


def test_a_student_with_another_head_takes_them_too(tmp_path: Path) -> None:
    learnt = first_stage(tmp_path / "first")
    model = BertForMaskedLM.from_pretrained(tmp_path / "first")
    trainer = DistillTrainer(
        model,
        arguments(tmp_path / "second"),
        teacher=tiny_model("bert", head="masked_lm"),
        losses=[HiddenStatesLoss()],
        train_dataset=rows(),
    )
    assert trainer.distillation is not None
    assert torch.equal(trainer.distillation.projections.state_dict()[f"{NAME}.weight"], learnt[f"{NAME}.weight"])


@pytest.mark.parametrize(
    ("loss", "width", "told"),
    [
        (HiddenStatesLoss(), 32, f"projection {NAME}: starts anew; it is 8 -> 32 here, and .* holds {NAME} \\(8 -> 16\\)"),
        (HiddenStatesLoss(projection="per_layer"), 16, f"layers_layer_1: starts anew; it is 8 -> 16 here, and .* holds {NAME}"),
    ],
    ids=["another width", "another name"],
)
def test_others_start_anew(tmp_path: Path, caplog: pytest.LogCaptureFixture, loss: HiddenStatesLoss, width: int, told: str) -> None:
    learnt = first_stage(tmp_path / "first")
    guide = tiny_model("bert", num_layers=4, hidden_size=width, intermediate_size=24, seed=1)
    with caplog.at_level(logging.INFO, "hf_compress"):
        trainer = second_stage(tmp_path / "second", tmp_path / "first", [loss], guide)
    assert trainer.distillation is not None
    started = trainer.distillation.projections.state_dict()
    assert all(tensor.shape[0] == width for tensor in started.values())
    assert not any(torch.equal(tensor, learnt[f"{NAME}.weight"]) for tensor in started.values() if tensor.dim() == 2)
    assert any(re.search(told, record.getMessage()) for record in caplog.records)


def test_a_student_from_elsewhere_hears_of_none(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    first_stage(tmp_path / "first")
    with caplog.at_level(logging.INFO, "hf_compress"):
        trained(tmp_path / "second", [HiddenStatesLoss()], model=tiny_model("bert", num_layers=2, **NARROW))
    assert not any(record.getMessage().startswith("projection") for record in caplog.records)


def test_a_damaged_file(tmp_path: Path) -> None:
    first_stage(tmp_path)
    path = tmp_path / FILE_NAME
    path.write_bytes(path.read_bytes()[:20])
    with pytest.raises(ArgumentError, match="Delete that file, and they start anew"):
        read_projections(tmp_path)


def test_a_run_without_projections_takes_away_those_of_an_earlier_one(tmp_path: Path) -> None:
    first_stage(tmp_path)
    trained(tmp_path, [HiddenStatesLoss()], model=tiny_model("bert", num_layers=2, seed=2), max_steps=1).save_model()
    assert not (tmp_path / FILE_NAME).exists()


def test_a_student_of_another_width_has_nothing_of_its_teachers_folder(tmp_path: Path) -> None:
    first_stage(tmp_path)
    student = student_from_teacher(BertForSequenceClassification.from_pretrained(tmp_path), hidden_size=8, num_attention_heads=2)
    assert loaded_from(student) is None


@pytest.mark.parametrize("which", ["student", "teacher"])
def test_what_was_learnt_between_other_models_is_refused(tmp_path: Path, which: str) -> None:
    learnt = first_stage(tmp_path)
    models = {"student": "bert", "teacher": "bert", "student_hidden_size": "8", "teacher_hidden_size": "16"}
    assert read_models(tmp_path) == models
    write_projections(tmp_path, learnt, {**models, which: "roberta"})
    with pytest.raises(TeacherError, match=f"learnt with a {which} of the kind roberta, and the {which} of this run is a bert"):
        second_stage(tmp_path / "second", tmp_path, [HiddenStatesLoss()])
    write_projections(tmp_path, learnt, {})  # one that does not say
    trainer = second_stage(tmp_path / "second", tmp_path, [HiddenStatesLoss()])
    assert trainer.distillation is not None
    assert torch.equal(trainer.distillation.projections.state_dict()[f"{NAME}.weight"], learnt[f"{NAME}.weight"])


def test_a_students_projections_are_written_with_it(tmp_path: Path) -> None:
    trainer = trained(tmp_path / "run", [HiddenStatesLoss()])
    save_student(trainer.model, tmp_path / "student")
    assert trainer.distillation is not None
    stored = read_projections(tmp_path / "student")
    assert all(torch.equal(tensor, stored[name]) for name, tensor in trainer.distillation.projections.state_dict().items())
    assert read_models(tmp_path / "student")["teacher"] == "bert"
