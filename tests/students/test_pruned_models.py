"""Pruned architectures: as large as they should be, loaded by transformers' automatic classes, and seen by all that works on layers."""

from __future__ import annotations

import copy
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers
from transformers import AutoConfig, AutoModel, AutoModelForSequenceClassification

from hf_compress.capture import Capture
from hf_compress.layers.drop import drop_layers
from hf_compress.layers.stack import find_stacks
from hf_compress.registration import MODEL_TYPES, _StandIn
from hf_compress.signals import AttentionScores, SignalSpec
from hf_compress.students.factorized_embedding import FactorizedDecoder
from hf_compress.students.from_teacher import load_teacher, student_from_teacher
from hf_compress.students.prune import prune_student
from hf_compress.students.pruned_config import PrunedBertConfig, PrunedDistilBertConfig, PrunedRobertaConfig
from hf_compress.students.pruned_models import Pruned, PrunedBertForSequenceClassification
from hf_compress.task import ModelShape, kind_of
from hf_compress.without_weights import model_without_weights
from tests.students.pruning import FAMILIES, labelled, teacher
from tests.tiny_models import tiny_batch

AUTOMATIC = {
    "base": "AutoModel",
    "sequence_classification": "AutoModelForSequenceClassification",
    "token_classification": "AutoModelForTokenClassification",
    "question_answering": "AutoModelForQuestionAnswering",
    "multiple_choice": "AutoModelForMultipleChoice",
    "masked_lm": "AutoModelForMaskedLM",
}


def pruned(family: str = "bert", head: str = "sequence_classification", num_layers: int = 3) -> Pruned:
    """A student with 3 of 4 heads, 10 of 24 neurons and rank 6 of 16; a model without a head keeps heads and neurons."""
    model = teacher(family, head=head, num_layers=num_layers)
    sizes = {} if head == "base" else {"num_attention_heads": 3, "intermediate_size": 10}
    student = prune_student(model, None if head == "base" else labelled(model, batches=4), embedding_rank=6, **sizes)
    assert isinstance(student, Pruned)
    return student.eval()


def test_rosita_6_has_as_many_parameters_as_the_paper_says() -> None:
    config = PrunedBertConfig(
        num_hidden_layers=6, num_attention_heads=2, attention_head_size=64, intermediate_size=768, embedding_size=128, num_labels=2
    )
    with torch.device("meta"):
        model = AutoModelForSequenceClassification.from_config(config)
    assert type(model) is PrunedBertForSequenceClassification
    assert model.num_parameters() == 14_465_282


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("head", AUTOMATIC)
def test_the_automatic_classes_load_it_as_it_was_saved(family: str, head: str, tmp_path: Path) -> None:
    student = pruned(family, head)
    student.save_pretrained(tmp_path)
    loaded, info = getattr(transformers, AUTOMATIC[head]).from_pretrained(tmp_path, output_loading_info=True)
    assert type(loaded) is type(student)
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    found, expected = loaded.config.to_dict(), student.config.to_dict()
    assert {name for name in found if found[name] != expected.get(name)} <= {"_name_or_path"}
    batch = labelled(student, batches=1)[0] if head == "multiple_choice" else tiny_batch(student)
    with torch.no_grad():
        assert torch.equal(loaded.eval()(**batch)[0], student(**batch)[0])
    assert type(load_teacher(str(tmp_path))) is type(student)
    assert model_without_weights(str(tmp_path)).num_parameters() == student.num_parameters()


def test_the_encoder_alone_can_be_loaded(tmp_path: Path) -> None:
    student = pruned()
    student.save_pretrained(tmp_path)
    encoder = AutoModel.from_pretrained(tmp_path)
    assert torch.equal(encoder.encoder.layer[0].attention.self.query.weight, student.bert.encoder.layer[0].attention.self.query.weight)
    assert torch.equal(encoder.embeddings.word_embeddings.projection.weight, student.bert.embeddings.word_embeddings.projection.weight)


def test_a_config_alone_fills_in_what_is_not_said() -> None:
    config = PrunedBertConfig(hidden_size=16, num_attention_heads=4, num_hidden_layers=1, intermediate_size=8, vocab_size=9)
    assert (config.attention_head_size, config.embedding_size) == (4, 16)
    assert type(AutoConfig.for_model("pruned_bert")) is PrunedBertConfig
    model = PrunedBertForSequenceClassification(config)
    plain = transformers.BertForSequenceClassification(transformers.BertConfig(**{**config.to_dict(), "model_type": "bert"}))
    assert {name: value.shape for name, value in model.state_dict().items()} == {
        name: value.shape for name, value in plain.state_dict().items()
    }


@pytest.mark.parametrize("sizes", [(5, 4), (3, 4), (1, 16), (2, 7)])
def test_heads_need_not_fill_or_divide_the_width(sizes: tuple[int, int]) -> None:
    heads, head_size = sizes
    config = PrunedBertConfig(
        hidden_size=16, num_attention_heads=heads, attention_head_size=head_size, num_hidden_layers=1, intermediate_size=8, vocab_size=50
    )
    model = PrunedBertForSequenceClassification(config)
    attention = model.bert.encoder.layer[0].attention.self
    assert (attention.query.out_features, attention.num_attention_heads) == (heads * head_size, heads)
    assert attention.scaling == pytest.approx(head_size**-0.5)
    assert model.config.num_attention_heads == heads
    assert model(torch.tensor([[3, 4, 5]])).logits.isfinite().all()
    deviation = float(attention.query.weight.detach().std())
    assert 0.01 < deviation < 0.03, "new weights are initialised as BERT's are"


@pytest.mark.parametrize("family", FAMILIES)
def test_a_masked_language_models_factors_stay_tied(family: str, tmp_path: Path) -> None:
    student = pruned(family, "masked_lm")
    student.save_pretrained(tmp_path)
    for model in (student, transformers.AutoModelForMaskedLM.from_pretrained(tmp_path)):
        decoder, embedding = model.get_output_embeddings(), model.get_input_embeddings()
        assert isinstance(decoder, FactorizedDecoder)
        assert decoder.weight is embedding.weight
        assert decoder.projection.weight is embedding.projection.weight
        model.resize_token_embeddings(60, mean_resizing=False)
        assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
        assert model(torch.tensor([[55, 3]])).logits.shape == (1, 2, 60)


def test_its_layers_are_found_its_shape_is_right_and_its_scores_are_heard() -> None:
    student = pruned()
    shape = ModelShape.of(student)
    assert (shape.kind, kind_of(student)) == ("sequence_classification", "sequence_classification")
    assert (shape.stacks["layers"].num_layers, shape.stacks["layers"].num_attention_heads, shape.stacks["layers"].hidden_size) == (3, 3, 16)
    assert shape.shows_attention_scores
    spec = SignalSpec(attention_scores=frozenset({AttentionScores("layers", 2)}))
    batch, capture = tiny_batch(student), Capture(student, spec, only_in_training=False)
    scores = capture.signals(student(**batch)).attention_scores[AttentionScores("layers", 2)]
    capture.remove()
    student.set_attn_implementation("eager")
    probabilities = student(**batch, output_attentions=True).attentions[1]  # (batch, heads, queries, keys)
    masked = scores.masked_fill(batch["attention_mask"][:, None, None] == 0, -1e9)
    assert scores.shape == (3, 3, 7, 7)
    torch.testing.assert_close(masked.softmax(-1), probabilities, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("family", FAMILIES)
def test_layers_can_be_dropped_from_it(family: str, tmp_path: Path) -> None:
    student = pruned(family, num_layers=4)
    drop_layers(student, strategy="symmetric", num_layers_to_drop=2)
    student.save_pretrained(tmp_path)
    loaded = AutoModelForSequenceClassification.from_pretrained(tmp_path).eval()
    assert find_stacks(loaded)["layers"].depth == 2
    with torch.no_grad():
        assert torch.equal(loaded(**tiny_batch(student)).logits, student(**tiny_batch(student)).logits)


def test_a_student_of_another_width_can_be_made_of_it() -> None:
    model = student_from_teacher(pruned(), hidden_size=12, seed=1)
    assert isinstance(model, Pruned)
    assert model(**tiny_batch(model)).logits.isfinite().all()


@pytest.mark.slow
@pytest.mark.parametrize(
    "imports",
    [
        "import hf_compress; from transformers import AutoModelForSequenceClassification as Auto",
        "from transformers import AutoModelForSequenceClassification as Auto; import hf_compress",
        # BertConfig's own module asks for transformers' tables while it is on its way.
        "import hf_compress, importlib.util as u; u.find_spec('transformers.models.auto.configuration_auto'); "
        "from transformers import AutoModelForSequenceClassification as Auto",
        "import hf_compress; from transformers import BertConfig; from transformers import AutoModelForSequenceClassification as Auto",
    ],
)
def test_importing_the_package_before_or_after_transformers_is_enough(imports: str, tmp_path: Path) -> None:
    pruned().save_pretrained(tmp_path)
    code = f"{imports}; print(type(Auto.from_pretrained({str(tmp_path)!r})).__name__)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split()[-1] == "PrunedBertForSequenceClassification"


def test_it_can_be_pickled_copied_and_exported() -> None:
    student = pruned()
    batch = tiny_batch(student)
    exported = torch.export.export(student, (), kwargs=dict(batch)).module()
    with torch.no_grad():
        expected = student(**batch).logits
        for other in (pickle.loads(pickle.dumps(student)), copy.deepcopy(student)):
            assert torch.equal(other(**batch).logits, expected)
        torch.testing.assert_close(exported(**batch).logits, expected)


def test_what_stands_in_for_a_config_class_answers_as_the_class() -> None:
    for stand_in in (_StandIn("pruned_bert"), pickle.loads(pickle.dumps(_StandIn("pruned_bert")))):
        assert stand_in.model_type == "pruned_bert"
        assert stand_in.__name__ == "PrunedBertConfig"
        assert type(stand_in(num_hidden_layers=1)) is PrunedBertConfig
    assert {config.model_type for config in (PrunedBertConfig, PrunedRobertaConfig, PrunedDistilBertConfig)} == set(MODEL_TYPES)
