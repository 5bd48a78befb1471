"""The teacher's config at another width, of every architecture: it makes a model that runs."""

from __future__ import annotations

import pytest
import torch
from transformers import BertConfig, BertForSequenceClassification, PreTrainedConfig, Qwen3Config

from hf_compress.errors import ArgumentError
from hf_compress.students.from_teacher import student_from_teacher
from hf_compress.students.width import with_width
from tests.tiny_models import ARCHITECTURES, tiny_batch, tiny_config, tiny_model


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_narrower_and_shallower_student_of_every_architecture_runs(architecture: str) -> None:
    teacher = tiny_model(architecture, num_layers=4)
    student = student_from_teacher(teacher, num_hidden_layers=2, hidden_size=8, num_attention_heads=2, intermediate_size=12, seed=1).eval()
    assert type(student) is type(teacher)
    config = student.config.get_text_config()
    assert (config.hidden_size, config.num_hidden_layers, config.num_attention_heads) == (8, 2, 2)
    assert student.num_parameters() < teacher.num_parameters()
    batch = tiny_batch(student)
    with torch.no_grad():
        logits = student(**batch).logits
    assert logits.isfinite().all()
    assert teacher.config.hidden_size == 16


def test_tinybert4_has_the_papers_number_of_parameters() -> None:
    with torch.device("meta"):
        teacher = BertForSequenceClassification(BertConfig(num_labels=2))
        student = student_from_teacher(teacher, num_hidden_layers=4, hidden_size=312, num_attention_heads=12, intermediate_size=1200)
    head = 312 * 2 + 2
    assert student.num_parameters() == 14_350_248 + head


def test_the_feed_forward_size_keeps_its_ratio() -> None:
    assert with_width(BertConfig(), hidden_size=384).intermediate_size == 1536
    assert with_width(BertConfig(), num_hidden_layers=4).intermediate_size == 3072


def test_labels_and_problem_type_stay() -> None:
    config = BertConfig(
        id2label={0: "no", 1: "yes", 2: "maybe"}, label2id={"no": 0, "yes": 1, "maybe": 2}, problem_type="single_label_classification"
    )
    student = with_width(config, hidden_size=384)
    assert student.id2label == {0: "no", 1: "yes", 2: "maybe"}
    assert student.label2id == config.label2id
    assert (student.num_labels, student.problem_type) == (3, "single_label_classification")


def test_key_value_heads_follow_the_heads_and_layer_types_the_depth() -> None:
    config = tiny_config("qwen3", num_layers=4, num_attention_heads=4, num_key_value_heads=2, head_dim=4)
    student = with_width(config, num_hidden_layers=2, hidden_size=24, num_attention_heads=2)
    assert isinstance(student, Qwen3Config)
    assert (student.num_key_value_heads, student.head_dim) == (1, 12)
    assert student.layer_types == config.layer_types[:2]


def test_a_head_size_of_its_own_stays() -> None:
    config = tiny_config("qwen3", head_dim=32)
    assert with_width(config, hidden_size=8).head_dim == 32


def test_a_record_of_dropped_layers_does_not_go_along() -> None:
    config = BertConfig()
    config.hf_compress = {"layer_drop": {"layers": {"kept": [1, 2], "num_layers": 3}}}
    assert not hasattr(with_width(config, hidden_size=384), "hf_compress")
    assert config.hf_compress


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"hidden_size": 100}, "cannot be divided among 12 attention heads"),
        ({"hidden_size": 0}, "at least 1"),
        ({"hidden_size": 384, "num_hidden_layers": 0}, "at least 1"),
        ({"hidden_size": 384, "num_hidden_layers": 13}, "only 12 layers"),
        ({"intermediate_size": -1}, "intermediate_size is -1"),
    ],
)
def test_a_width_that_cannot_be_is_refused(given: dict[str, int], words: str) -> None:
    with pytest.raises(ArgumentError, match=words):
        with_width(BertConfig(), **given)


def test_what_does_divide_is_named() -> None:
    with pytest.raises(ArgumentError, match="from 2, 4, 5") as refused:
        with_width(BertConfig(num_attention_heads=6, hidden_size=96), hidden_size=100)
    assert "--hidden_size 96 or 102" in str(refused.value)


def test_a_config_of_unknown_names_is_refused() -> None:
    with pytest.raises(ArgumentError, match="does not state its depth"):
        with_width(PreTrainedConfig(), hidden_size=8)
