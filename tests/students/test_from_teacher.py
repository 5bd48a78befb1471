"""Students of the teacher's own layers."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import PreTrainedTokenizerFast

from hf_compress.errors import ArgumentError, LayerDropError, TeacherError
from hf_compress.layers.record import recorded_drop
from hf_compress.layers.stack import find_stacks
from hf_compress.students.from_teacher import evenly_spread, load_teacher, student_from_teacher
from hf_compress.students.save import save_student
from tests.tiny_models import ARCHITECTURES, tiny_batch, tiny_model


def test_kept_layers_are_copies_and_the_teacher_stays() -> None:
    teacher = tiny_model("bert", num_layers=6)
    student = student_from_teacher(teacher, layers_to_keep=(1, 4, 6))
    assert (len(teacher.bert.encoder.layer), len(student.bert.encoder.layer)) == (6, 3)
    for position, layer in enumerate((1, 4, 6)):
        theirs, ours = teacher.bert.encoder.layer[layer - 1].state_dict(), student.bert.encoder.layer[position].state_dict()
        assert all(torch.equal(theirs[name], ours[name]) for name in theirs)
    with torch.no_grad():
        student.bert.encoder.layer[0].attention.self.query.weight.zero_()
    assert teacher.bert.encoder.layer[0].attention.self.query.weight.abs().sum() > 0
    recorded = recorded_drop(student.config)
    assert recorded is not None
    assert (recorded["layers"].kept, recorded["layers"].num_layers) == ((1, 4, 6), 6)
    assert recorded_drop(teacher.config) is None


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_number_of_layers_alone_works_for_every_architecture(architecture: str) -> None:
    student = student_from_teacher(tiny_model(architecture, num_layers=4), num_hidden_layers=2)
    assert {stack.depth for stack in find_stacks(student).values()} == {2}
    with torch.no_grad():
        assert student(**tiny_batch(student)).logits.isfinite().all()


@pytest.mark.parametrize(
    ("keep", "of", "layers"),
    [
        (4, 6, (1, 2, 4, 6)),
        (3, 6, (1, 3, 6)),
        (4, 12, (1, 4, 8, 12)),
        (6, 12, (1, 3, 5, 7, 9, 12)),
        (11, 12, (1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 12)),
        (2, 6, (1, 6)),
        (1, 6, (6,)),
    ],
)
def test_evenly_spread(keep: int, of: int, layers: tuple[int, ...]) -> None:
    assert evenly_spread(keep, of) == layers


def test_evenly_spread_names_each_layer_once() -> None:
    for of in range(2, 40):
        for keep in range(1, of):
            layers = evenly_spread(keep, of)
            assert len(set(layers)) == keep
            assert layers[-1] == of


def test_a_frozen_teachers_student_can_be_trained() -> None:
    teacher = tiny_model("bert").requires_grad_(False)
    student = student_from_teacher(teacher, num_hidden_layers=2)
    assert all(parameter.requires_grad for parameter in student.parameters())
    assert not any(parameter.requires_grad for parameter in teacher.parameters())


def test_layers_of_a_teacher_that_lost_some_are_counted_in_that_teacher() -> None:
    teacher = student_from_teacher(tiny_model("bert", num_layers=6), layers_to_keep=(1, 2, 5, 6))
    student = student_from_teacher(teacher, layers_to_keep=(1, 4))
    recorded = recorded_drop(student.config)
    assert recorded is not None
    assert (recorded["layers"].kept, recorded["layers"].num_layers) == ((1, 4), 4)


def test_a_seed_makes_the_same_student_and_leaves_torchs_own_state() -> None:
    teacher = tiny_model("bert")
    torch.manual_seed(5)
    first = student_from_teacher(teacher, hidden_size=8, seed=1)
    after = torch.rand(1)
    torch.manual_seed(5)
    assert torch.equal(after, torch.rand(1))
    second = student_from_teacher(teacher, hidden_size=8, seed=1)
    other = student_from_teacher(teacher, hidden_size=8, seed=2)
    assert torch.equal(first.bert.encoder.layer[0].attention.self.query.weight, second.bert.encoder.layer[0].attention.self.query.weight)
    assert not torch.equal(first.bert.encoder.layer[0].attention.self.query.weight, other.bert.encoder.layer[0].attention.self.query.weight)


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({}, "Say what the student is like"),
        ({"layers_to_keep": (1,), "num_hidden_layers": 1}, "contradict"),
        ({"layers_to_keep": (1,), "hidden_size": 8}, "teacher's weights"),
        ({"num_hidden_layers": 4}, "expected 1 to 3"),
        ({"num_hidden_layers": 0}, "expected 1 to 3"),
    ],
)
def test_what_contradicts_itself_is_refused(given: dict[str, object], words: str) -> None:
    with pytest.raises(ArgumentError, match=words):
        student_from_teacher(tiny_model("bert", num_layers=4), **given)  # type: ignore[arg-type]


def test_layers_that_are_not_there_are_refused() -> None:
    with pytest.raises(LayerDropError, match="5"):
        student_from_teacher(tiny_model("bert", num_layers=4), layers_to_keep=(1, 5))


def test_a_path_gives_the_same_as_the_model(tmp_path: Path) -> None:
    teacher = tiny_model("distilbert")
    teacher.save_pretrained(tmp_path / "teacher")
    student = student_from_teacher(str(tmp_path / "teacher"), layers_to_keep=(2, 4))
    assert type(student) is type(teacher)
    batch = tiny_batch(teacher)
    with torch.no_grad():
        expected = student_from_teacher(teacher, layers_to_keep=(2, 4)).eval()(**batch).logits
        assert torch.equal(student.eval()(**batch).logits, expected)
    assert student_from_teacher(str(tmp_path / "teacher"), hidden_size=8).config.dim == 8


def test_a_teacher_that_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(TeacherError, match="nothing_here"):
        load_teacher(str(tmp_path / "nothing_here"))
    config = tiny_model("bert").config
    config.architectures = None
    config.save_pretrained(tmp_path)
    with pytest.raises(TeacherError, match="no architecture"):
        load_teacher(str(tmp_path))
    config.architectures = ["BertForSequenceClassification"]
    config.save_pretrained(tmp_path)
    with pytest.raises(TeacherError, match="No weights"):
        load_teacher(str(tmp_path))


def test_a_saved_student_reloads_with_its_tokenizer_and_label_names(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    teacher = tiny_model("bert", id2label={0: "no", 1: "yes"}, label2id={"no": 0, "yes": 1})
    teacher.save_pretrained(tmp_path / "teacher")
    tokenizer.save_pretrained(tmp_path / "teacher")
    student = student_from_teacher(teacher, layers_to_keep=(1, 3)).eval()
    assert save_student(student, tmp_path / "student", tmp_path / "teacher") is not None
    reloaded = load_teacher(str(tmp_path / "student")).eval()
    batch = tiny_batch(student)
    with torch.no_grad():
        assert torch.equal(reloaded(**batch).logits, student(**batch).logits)
    assert reloaded.config.id2label == {0: "no", 1: "yes"}
    again = PreTrainedTokenizerFast.from_pretrained(tmp_path / "student")
    assert again("one two")["input_ids"] == tokenizer("one two")["input_ids"]


def test_a_teacher_without_a_tokenizer_is_said_to_have_none(tmp_path: Path) -> None:
    teacher = tiny_model("bert")
    teacher.save_pretrained(tmp_path / "teacher")
    assert save_student(student_from_teacher(teacher, num_hidden_layers=2), tmp_path / "student", tmp_path / "teacher") is None
    assert (tmp_path / "student" / "config.json").exists()


def test_the_teachers_own_folder_is_not_overwritten(tmp_path: Path) -> None:
    teacher = tiny_model("bert")
    teacher.save_pretrained(tmp_path)
    before = (tmp_path / "config.json").read_text()
    with pytest.raises(ArgumentError, match="overwritten"):
        save_student(student_from_teacher(teacher, num_hidden_layers=2), tmp_path, tmp_path)
    assert (tmp_path / "config.json").read_text() == before
    (tmp_path / "file").write_text("")
    with pytest.raises(ArgumentError, match="is a file"):
        save_student(teacher, tmp_path / "file", None)
