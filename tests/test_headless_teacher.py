"""A teacher whose predictions no loss reads needs no head; one whose predictions are read does."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
import torch
from transformers import BertForSequenceClassification, BertModel

from hf_compress.arguments import CompressionArguments
from hf_compress.cli.app import main
from hf_compress.errors import CacheError, TeacherError
from hf_compress.losses.hidden_states import HiddenStatesLoss
from hf_compress.losses.logits import LogitsLoss
from hf_compress.teacher import load_teacher
from hf_compress.teacher_identity import weights_hash
from hf_compress.trainer import DistillTrainer
from tests.tiny_models import tiny_batch, tiny_model
from tests.tiny_runs import arguments, rows, student


@pytest.fixture
def bare(tmp_path: Path) -> str:
    tiny_model("bert", num_layers=4, head="base", seed=1).save_pretrained(tmp_path / "bare")
    return str(tmp_path / "bare")


@pytest.fixture
def language_model(tmp_path: Path) -> str:
    tiny_model("bert", num_layers=4, head="masked_lm", seed=1).save_pretrained(tmp_path / "lm")
    return str(tmp_path / "lm")


def test_a_language_model_is_loaded_without_the_head_that_nobody_reads(language_model: str) -> None:
    model = load_teacher(language_model, "masked_lm", needs_logits=False)
    assert type(model) is BertModel
    assert model.pooler is None  # it was not trained
    batch = tiny_batch(model)
    with torch.no_grad():
        expected = tiny_model("bert", num_layers=4, head="masked_lm", seed=1).bert(**batch).last_hidden_state
        assert torch.equal(model(**batch).last_hidden_state, expected)


def test_it_is_the_same_teacher_each_time_and_draws_nothing(language_model: str) -> None:
    hashes = set()
    for seed in (1, 2):
        torch.manual_seed(seed)
        before = torch.random.get_rng_state()
        hashes.add(weights_hash(load_teacher(language_model, "masked_lm", needs_logits=False).state_dict().items()))
        assert torch.equal(torch.random.get_rng_state(), before)
    assert len(hashes) == 1


def test_a_trained_pooler_stays(bare: str) -> None:
    assert load_teacher(bare, "other", needs_logits=False).pooler is not None


def test_predictions_that_are_read_need_a_head(bare: str) -> None:
    with pytest.raises(TeacherError, match=r"no trained head: cls\.predictions\.bias"):
        load_teacher(bare, "masked_lm")
    with pytest.raises(TeacherError, match="compare no predictions"):
        load_teacher(bare, "other")


def test_an_encoder_that_is_not_whole(tmp_path: Path) -> None:
    model = tiny_model("bert", num_layers=2, head="base")
    kept = {name: tensor for name, tensor in model.state_dict().items() if "layer.1." not in name}
    model.save_pretrained(tmp_path, state_dict=kept)
    with pytest.raises(TeacherError, match=r"is not whole: encoder\.layer\.1\..* would be newly initialised"):
        load_teacher(str(tmp_path), "masked_lm", needs_logits=False)


def trainer(folder: Path, teacher: str, losses: list[HiddenStatesLoss | LogitsLoss], **flags: str) -> DistillTrainer:
    settings = CompressionArguments(**flags)
    return DistillTrainer(
        student(), arguments(folder), teacher=teacher, losses=losses, compression=settings, train_dataset=rows(), eval_dataset=rows(),
        compute_metrics=lambda prediction: {"accuracy": float((prediction.predictions.argmax(-1) == prediction.label_ids).mean())},
    )  # fmt: skip


def test_a_classifier_may_learn_layers_of_one_without_a_head_with_a_warning(
    tmp_path: Path, bare: str, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING, "hf_compress"):
        run = trainer(tmp_path / "run", bare, [HiddenStatesLoss()])
    assert "No loss reads its predictions, so its layers teach alone" in caplog.text
    before = run.model.bert.encoder.layer[0].output.dense.weight.detach().clone()
    run.train()
    assert not torch.equal(run.model.bert.encoder.layer[0].output.dense.weight, before)
    assert "teacher_accuracy" not in run.state.log_history[0]
    with pytest.raises(TeacherError, match="has no trained head"):
        trainer(tmp_path / "other", bare, [HiddenStatesLoss(), LogitsLoss()])


def test_a_fine_tuned_teacher_keeps_its_head_and_says_its_score(tmp_path: Path) -> None:
    tiny_model("bert", num_layers=4, seed=1).save_pretrained(tmp_path / "tuned")
    run = trainer(tmp_path / "run", str(tmp_path / "tuned"), [HiddenStatesLoss()])
    assert isinstance(run._teachers[0].loaded, BertForSequenceClassification)
    run.train()
    assert "teacher_accuracy" in run.state.log_history[0]


def test_on_disk_the_same_teacher_is_known_again(tmp_path: Path, language_model: str) -> None:
    def run(teacher: str) -> DistillTrainer:
        pupil = tiny_model("bert", num_layers=2, head="masked_lm", seed=2)
        flags = CompressionArguments(teacher_cache_dir=str(tmp_path / "cache"), teacher_model_name_or_path=teacher)
        return DistillTrainer(pupil, arguments(tmp_path / "run"), losses=[HiddenStatesLoss()], compression=flags, train_dataset=rows())

    run(language_model).train()
    run(language_model).train()
    tiny_model("bert", num_layers=4, head="masked_lm", seed=9).save_pretrained(tmp_path / "other")
    with pytest.raises(CacheError, match=r"teacher\.weights"):
        run(str(tmp_path / "other"))


def test_what_it_would_take_on_disk(bare: str, capsys: pytest.CaptureFixture[str]) -> None:
    asked = ["--teacher_model_name_or_path", bare, "--num_examples", "10", "--tokens_per_example", "8", "--num_layers", "2"]
    assert main(["cache", "estimate", *asked, "--distill_recipe", "tinybert_general"]) == 0
    shown = capsys.readouterr().out
    assert "all of the recipe tinybert_general" in shown
    assert "logits only" not in shown


def test_the_price_of_a_student_that_has_no_head_yet(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tiny_model("bert", num_layers=4).save_pretrained(tmp_path / "teacher")
    tiny_model("bert", num_layers=2, head="base").save_pretrained(tmp_path / "student")
    asked = ["--teacher_model_name_or_path", str(tmp_path / "teacher"), "--model_name_or_path", str(tmp_path / "student")]
    assert main(["cache", "estimate", *asked, "--num_examples", "10", "--tokens_per_example", "8", "--distill_recipe", "tinybert"]) == 0
    assert "student    2 layers" in capsys.readouterr().out
