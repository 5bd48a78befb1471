"""Students cut out of a teacher: what is kept is the teacher's own, and nothing pruned is nothing changed."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import BertForNextSentencePrediction, BertForSequenceClassification, BertModel, PreTrainedModel

from hf_compress.errors import ArgumentError, DataError, LayerDropError, TeacherError
from hf_compress.layers.record import recorded_drop
from hf_compress.students.encoder_parts import linear, parts_of
from hf_compress.students.from_teacher import student_from_teacher
from hf_compress.students.prune import prune_student
from hf_compress.students.pruned_models import Pruned
from hf_compress.students.pruning_record import describe_pruning, recorded_pruning
from tests.students.pruning import FAMILIES, HEAD_SIZE, HEADS, NEURONS, labelled, teacher
from tests.tiny_models import tiny_batch, tiny_config, tiny_model


def outputs(model: PreTrainedModel, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    with torch.no_grad():
        shown: torch.Tensor = model.eval()(**batch)[0]
    return shown


@pytest.mark.parametrize("family", FAMILIES)
def test_where_nothing_is_pruned_the_outputs_are_the_teachers_to_the_bit(family: str) -> None:
    model = teacher(family)
    student = prune_student(model, num_hidden_layers=3, num_attention_heads=HEADS, intermediate_size=NEURONS, embedding_rank=16)
    assert type(student) is type(model)
    assert torch.equal(outputs(student, tiny_batch(model)), outputs(model, tiny_batch(model)))


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("head", ["sequence_classification", "masked_lm"])
def test_embeddings_of_a_lower_rank_are_factorised_exactly(family: str, head: str) -> None:
    model = teacher(family, head=head)
    embedding = model.get_input_embeddings().weight
    with torch.no_grad():
        u, s, v = torch.linalg.svd(embedding, full_matrices=False)
        embedding.copy_(u[:, :5] * s[:5] @ v[:5])
    student = prune_student(model, embedding_rank=5)
    assert isinstance(student, Pruned)
    assert student.get_input_embeddings().weight.shape == (50, 5)
    torch.testing.assert_close(outputs(student, tiny_batch(model)), outputs(model, tiny_batch(model)), rtol=1e-5, atol=1e-5)
    pruning = recorded_pruning(student.config)
    assert pruning is not None
    assert pruning.embedding_share == pytest.approx(1.0)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_student_computes_what_the_teacher_does_without_the_others(family: str) -> None:
    model = teacher(family)
    student = prune_student(model, labelled(model), num_attention_heads=2, intermediate_size=10)
    pruning, parts = recorded_pruning(student.config), parts_of(family)
    assert pruning is not None
    assert parts is not None
    silenced = copy.deepcopy(model)
    before = model.base_model.get_submodule(parts.layers).children()
    after = student.base_model.get_submodule(parts.layers).children()
    for layer, cut, heads in zip(silenced.base_model.get_submodule(parts.layers).children(), after, pruning.heads, strict=True):
        theirs, ours = linear(next(before), parts.feed_forward_input).weight, linear(cut, parts.feed_forward_input).weight
        neurons = [index for index in range(NEURONS) if any(torch.equal(theirs[index], row) for row in ours)]
        assert len(neurons) == 10
        assert torch.equal(theirs[neurons], ours), "neurons keep their order"
        assert list(heads) == sorted(heads)
        with torch.no_grad():
            for head in set(range(1, HEADS + 1)) - set(heads):
                linear(layer, parts.attention_output).weight[:, (head - 1) * HEAD_SIZE : head * HEAD_SIZE] = 0
            linear(layer, parts.feed_forward_output).weight[:, sorted(set(range(NEURONS)) - set(neurons))] = 0
    torch.testing.assert_close(outputs(student, tiny_batch(model)), outputs(silenced, tiny_batch(model)), rtol=1e-5, atol=1e-6)
    assert not torch.allclose(outputs(student, tiny_batch(model)), outputs(model, tiny_batch(model)), atol=1e-3)


def test_what_does_nothing_is_what_goes() -> None:
    model = teacher()
    with torch.no_grad():
        for layer, head in zip(model.bert.encoder.layer, (0, 2, 3), strict=True):
            layer.attention.output.dense.weight[:, head * HEAD_SIZE : (head + 1) * HEAD_SIZE] = 0
            layer.output.dense.weight[:, 7:20] = 0
    student = prune_student(model, labelled(model), num_attention_heads=3, intermediate_size=11)
    pruning = recorded_pruning(student.config)
    assert pruning is not None
    assert pruning.heads == ((2, 3, 4), (1, 2, 4), (1, 2, 3))
    torch.testing.assert_close(outputs(student, tiny_batch(model)), outputs(model, tiny_batch(model)), rtol=1e-5, atol=1e-6)


def test_importance_is_measured_on_the_whole_teacher_and_the_layers_that_stay_are_recorded() -> None:
    model = teacher(num_layers=6)
    whole = recorded_pruning(prune_student(model, labelled(model), num_attention_heads=1).config)
    student = prune_student(model, labelled(model), layers_to_keep=(2, 5), num_attention_heads=1)
    pruning, drop = recorded_pruning(student.config), recorded_drop(student.config)
    assert whole is not None
    assert pruning is not None
    assert drop is not None
    assert pruning.heads == (whole.heads[1], whole.heads[4])
    assert (drop["layers"].kept, drop["layers"].num_layers) == ((2, 5), 6)
    head = pruning.heads[1][0] - 1
    theirs = model.bert.encoder.layer[4].attention.self.value.weight[head * HEAD_SIZE : (head + 1) * HEAD_SIZE]
    assert torch.equal(student.bert.encoder.layer[1].attention.self.value.weight, theirs)


@pytest.mark.parametrize(("strategy", "kept"), [("top", (1, 2)), ("bottom", (3, 4)), ("symmetric", (1, 4)), ("contribution", None)])
def test_layers_go_by_strategy(strategy: Any, kept: tuple[int, ...] | None) -> None:
    model = teacher(num_layers=4)
    student = prune_student(model, labelled(model), num_hidden_layers=2, layer_drop_strategy=strategy, embedding_rank=6)
    drop = recorded_drop(student.config)
    assert drop is not None
    assert len(drop["layers"].kept) == 2
    assert kept is None or drop["layers"].kept == kept


def test_depth_and_rank_alone_take_no_examples() -> None:
    student = prune_student(teacher(), num_hidden_layers=1, embedding_rank=6)
    pruning = recorded_pruning(student.config)
    assert pruning is not None
    assert (pruning.num_examples, pruning.heads) == (0, ((1, 2, 3, 4),))


def test_neurons_alone_leave_a_model_that_transformers_knows() -> None:
    model = teacher()
    student = prune_student(model, labelled(model), intermediate_size=8)
    assert type(student) is BertForSequenceClassification
    assert student.config.intermediate_size == 8


def test_the_teacher_stays_and_the_student_can_be_trained() -> None:
    model = teacher().requires_grad_(False)
    weights, config = copy.deepcopy(model.state_dict()), model.config.to_dict()
    generator = torch.get_rng_state()
    student = prune_student(model, labelled(model), num_hidden_layers=2, num_attention_heads=2, embedding_rank=4)
    assert torch.equal(torch.get_rng_state(), generator)
    assert all(torch.equal(weights[name], value) for name, value in model.state_dict().items())
    assert model.config.to_dict() == config
    assert all(parameter.requires_grad for parameter in student.parameters())
    with torch.no_grad():
        student.bert.pooler.dense.weight.zero_()
    assert model.bert.pooler.dense.weight.abs().sum() > 0


def test_the_same_examples_make_the_same_student() -> None:
    model = teacher()
    first, second = (prune_student(model, labelled(model), num_attention_heads=2, embedding_rank=4).state_dict() for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_a_student_can_be_pruned_again() -> None:
    model = teacher(num_layers=4)
    once = prune_student(model, labelled(model), num_hidden_layers=3, num_attention_heads=3, embedding_rank=8)
    twice = prune_student(once, labelled(model), num_hidden_layers=2, num_attention_heads=2, intermediate_size=9, embedding_rank=5)
    direct = prune_student(model, embedding_rank=5)
    pruning, drop = recorded_pruning(twice.config), recorded_drop(twice.config)
    assert pruning is not None
    assert drop is not None
    assert (type(twice), pruning.num_heads, pruning.rank, drop["layers"].num_layers) == (type(once), 3, (5, 8), 3)
    torch.testing.assert_close(twice.get_input_embeddings().weight, direct.get_input_embeddings().weight, rtol=1e-4, atol=1e-5)


def test_a_path_gives_the_same_as_the_model(tmp_path: Path) -> None:
    model = teacher()
    model.save_pretrained(tmp_path)
    ours, theirs = (prune_student(source, labelled(model), num_attention_heads=2) for source in (model, str(tmp_path)))
    assert torch.equal(outputs(ours, tiny_batch(model)), outputs(theirs, tiny_batch(model)))


def test_layers_of_a_teacher_that_lost_some_are_counted_in_that_teacher() -> None:
    model = student_from_teacher(teacher(num_layers=6), layers_to_keep=(1, 2, 5, 6))
    assert recorded_drop(prune_student(model, embedding_rank=4).config) is None
    drop = recorded_drop(prune_student(model, num_hidden_layers=3).config)
    assert drop is not None
    assert (drop["layers"].kept, drop["layers"].num_layers) == ((1, 2, 3), 4)


def test_half_precision_stays() -> None:
    model = teacher().to(torch.bfloat16)
    student = prune_student(model, labelled(model), num_hidden_layers=2, num_attention_heads=2, embedding_rank=4)
    assert {parameter.dtype for parameter in student.parameters()} == {torch.bfloat16}


def test_what_was_kept_in_words() -> None:
    model = teacher()
    student = prune_student(model, labelled(model), layers_to_keep=(1, 3), num_attention_heads=2, intermediate_size=9, embedding_rank=4)
    lines = describe_pruning(student.config).splitlines()
    assert lines[0] == "layers      kept 1 and 3 of 3"
    assert [line.split(":")[0].strip() for line in lines[1:3]] == ["heads       layer 1", "layer 3"]
    assert lines[1].endswith(f"of {HEADS}")
    assert lines[3] == f"neurons     9 of {NEURONS} in each layer"
    assert lines[4].startswith("embeddings  rank 4 of 16: ")
    assert lines[5] == "importance measured on 32 examples"


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({}, "Say what is to be pruned"),
        ({"num_attention_heads": 5}, "num_attention_heads is 5, but the teacher has 4 heads in each layer; expected 1 to 4"),
        ({"num_attention_heads": 0}, "num_attention_heads is 0"),
        ({"intermediate_size": 25}, "the teacher has 24 feed-forward neurons in each layer"),
        ({"intermediate_size": 0}, "expected 1 to 24"),
        ({"embedding_rank": 17}, "the teacher has word embeddings of rank 16; expected 1 to 16"),
        ({"embedding_rank": -1}, "embedding_rank is -1"),
        ({"num_hidden_layers": 4}, "the teacher has 3 layers; expected 1 to 3"),
        ({"num_hidden_layers": 2, "layers_to_keep": (1, 2)}, "contradict each other"),
        ({"num_attention_heads": 2}, "Which heads and neurons stay is measured on labelled examples: give batches"),
        ({"num_hidden_layers": 2, "layer_drop_strategy": "contribution"}, "Which layers contribute least"),
        ({"embedding_rank": 4, "faithful": "paper"}, "expected 'released_code'"),
    ],
)
def test_what_cannot_be_pruned_is_refused(given: dict[str, Any], words: str) -> None:
    with pytest.raises(ArgumentError, match=words):
        prune_student(teacher(), **given)


def test_layers_and_samples_that_do_not_do_are_refused() -> None:
    model = teacher()
    with pytest.raises(LayerDropError, match="holds 4"):
        prune_student(model, layers_to_keep=(1, 4))
    with pytest.raises(DataError, match="there are 16"):
        prune_student(model, labelled(model, batches=1), num_attention_heads=2)
    with pytest.raises(ArgumentError, match="num_examples is 20; expected 32 at least"):
        prune_student(model, labelled(model), num_attention_heads=2, num_examples=20)
    with pytest.raises(TeacherError, match="takes no labels"):
        prune_student(teacher(head="base"), labelled(model), num_attention_heads=2)


def test_other_architectures_are_refused_with_the_list() -> None:
    with pytest.raises(TeacherError, match=r"ElectraForSequenceClassification, which cannot be pruned\. These can: BertForMaskedLM, "):
        prune_student(tiny_model("electra"), num_hidden_layers=2)
    with pytest.raises(TeacherError, match="BertForNextSentencePrediction"):
        prune_student(BertForNextSentencePrediction(tiny_model("bert").config), num_hidden_layers=2)
    with pytest.raises(TeacherError, match="used as a decoder"):
        prune_student(teacher(is_decoder=True, head="base"), num_hidden_layers=2)


def test_a_model_without_a_pooler() -> None:
    model = BertModel(tiny_config("bert", num_layers=3), add_pooling_layer=False).eval()
    for pruned in ({"embedding_rank": 4}, {"num_hidden_layers": 2}):
        student = prune_student(model, **pruned)
        assert student.pooler is None
        assert outputs(student, tiny_batch(model)).shape == outputs(model, tiny_batch(model)).shape
    assert torch.equal(outputs(prune_student(model, embedding_rank=16), tiny_batch(model)), outputs(model, tiny_batch(model)))
