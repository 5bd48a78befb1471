"""What DistillTrainer refuses in its __init__, without any data, and what it says about a model that is its own teacher."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
from transformers import BertForSequenceClassification, DataCollatorForLanguageModeling

from hf_compress.errors import ArgumentError, CompressionError, LossError, TeacherError
from hf_compress.layers.drop import drop_layers
from hf_compress.losses.hidden_states import HiddenStatesLoss
from hf_compress.losses.labels import LabelsLoss
from hf_compress.losses.logits import LogitsLoss
from hf_compress.trainer import DistillTrainer
from tests.tiny_models import tiny_model
from tests.tiny_runs import arguments, rows, student, teacher
from tests.tiny_text import tokenizer


@pytest.mark.parametrize(
    ("given", "kind", "words"),
    [
        ({}, TeacherError, "DistillTrainer has no teacher"),
        ({"losses": [LogitsLoss(), HiddenStatesLoss(), LabelsLoss()]}, TeacherError, "losses logits, hidden_states compare with a teacher"),
        ({"teacher": 5}, TeacherError, "teacher is 5: expected a fine-tuned model"),
        ({"teacher": "x", "losses": LogitsLoss()}, LossError, r"has to be a list of losses: losses=\[LogitsLoss\(...\)\]"),
        ({"teacher": "x", "losses": "logits"}, LossError, r"losses is 'logits', and has to be a list"),
        ({"teacher": "x", "losses": ["logits"]}, LossError, r"losses holds 'logits'.*in Python losses are objects"),
        ({"teacher": "x", "losses": []}, LossError, "empty list"),
    ],
)
def test_what_can_be_known_without_data(tmp_path: Path, given: dict[str, Any], kind: type[CompressionError], words: str) -> None:
    with pytest.raises(kind, match=words):
        DistillTrainer(student(), arguments(tmp_path / "out"), **given)
    assert not (tmp_path / "out").exists()


def test_labels_alone_need_no_teacher(tmp_path: Path) -> None:
    DistillTrainer(student(), arguments(tmp_path), losses=[LabelsLoss(), LogitsLoss(weight=0.0)])


def test_a_model_that_is_its_own_teacher(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = str(tmp_path / "model")
    tiny_model("bert", num_layers=4).save_pretrained(path)
    settings: dict[str, Any] = {"teacher": path, "losses": [LogitsLoss()], "train_dataset": rows()}
    with caplog.at_level(logging.WARNING, logger="hf_compress"):
        smaller = BertForSequenceClassification.from_pretrained(path)
        drop_layers(smaller, strategy="top")
        DistillTrainer(smaller, arguments(tmp_path / "a"), **settings)
        DistillTrainer(student(), arguments(tmp_path / "a"), **{**settings, "teacher": teacher()})
        assert "its own teacher" not in caplog.text
        DistillTrainer(BertForSequenceClassification.from_pretrained(path + "/"), arguments(tmp_path / "b"), **settings)
    assert caplog.text.count("so the student begins as its own teacher") == 1


@pytest.mark.parametrize(("probability", "evaluated", "refused"), [(0.0, True, True), (0.0, False, False), (0.15, True, False)])
def test_an_evaluation_in_which_nothing_is_masked(tmp_path: Path, probability: float, evaluated: bool, refused: bool) -> None:
    def make() -> None:
        DistillTrainer(
            tiny_model("bert", num_layers=2, head="masked_lm"),
            arguments(tmp_path),
            teacher=tiny_model("bert", head="masked_lm"),
            losses=[HiddenStatesLoss()],
            data_collator=DataCollatorForLanguageModeling(tokenizer(), mlm_probability=probability),
            train_dataset=rows(),
            eval_dataset=rows() if evaluated else None,
        )

    if not refused:
        make()
        return
    with pytest.raises(ArgumentError, match=r"masks no word .* Leave --do_eval and --eval_strategy out"):
        make()
