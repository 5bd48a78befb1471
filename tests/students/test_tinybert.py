"""A checkpoint of the layout in which General TinyBERT was published, made here, and broken in every way that is refused."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from hf_compress.cli.app import main
from hf_compress.errors import ArgumentError
from hf_compress.losses.hidden_states import EmbeddingsLoss, HiddenStatesLoss
from hf_compress.projection_file import read_projections
from hf_compress.students.tinybert import is_general_tinybert, read_general_tinybert
from hf_compress.trainer import DistillTrainer
from tests.tiny_models import tiny_model
from tests.tiny_runs import arguments, rows

WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *(f"word{number}" for number in range(45))]
# As it was published: no model_type, no architectures.
CONFIG = {
    "attention_probs_dropout_prob": 0.1,
    "cell": {},
    "emb_size": 16,
    "hidden_act": "gelu",
    "hidden_dropout_prob": 0.1,
    "hidden_size": 16,
    "initializer_range": 0.02,
    "intermediate_size": 24,
    "max_position_embeddings": 40,
    "num_attention_heads": 2,
    "num_hidden_layers": 3,
    "pre_trained": "",
    "structure": [],
    "training": "",
    "type_vocab_size": 2,
    "vocab_size": 50,
}


def published(*, old_names: bool = False) -> dict[str, torch.Tensor]:
    """Weights under the names of the released code."""
    own = tiny_model("bert", num_layers=3, head="base").state_dict()
    tensors = {f"bert.{name}": tensor for name, tensor in own.items()}
    if old_names:
        norms = {"LayerNorm.weight": "LayerNorm.gamma", "LayerNorm.bias": "LayerNorm.beta"}
        for new, old in norms.items():
            tensors = {name.replace(new, old): tensor for name, tensor in tensors.items()}
    generator = torch.Generator().manual_seed(1)
    return {
        **tensors,
        "cls.predictions.bias": torch.zeros(50),
        "cls.seq_relationship.weight": torch.zeros(2, 16),
        "fit_dense.weight": torch.randn(32, 16, generator=generator),
        "fit_dense.bias": torch.randn(32, generator=generator),
    }


def write(folder: Path, tensors: Any, *, words: list[str] = WORDS, **config: Any) -> str:
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({**CONFIG, **config}))
    (folder / "vocab.txt").write_text("\n".join(words) + "\n")
    torch.save(tensors, folder / "pytorch_model.bin")
    return str(folder)


@pytest.mark.parametrize("old_names", [False, True])
def test_it_becomes_a_student(tmp_path: Path, capsys: pytest.CaptureFixture[str], old_names: bool) -> None:
    source, out = write(tmp_path / "published", published(old_names=old_names)), tmp_path / "student"
    assert main(["student", source, "-o", str(out)]) == 0
    assert "General TinyBERT: 3 layers x 16, 2 heads" in capsys.readouterr().out
    student = AutoModelForSequenceClassification.from_pretrained(out)
    theirs = published()
    ours = {f"bert.{name}": tensor for name, tensor in student.bert.state_dict().items()}
    assert ours.keys() == {name for name in theirs if name.startswith("bert.")}
    assert all(torch.equal(tensor, theirs[name]) for name, tensor in ours.items())
    projection = read_projections(out)
    assert torch.equal(projection["layers_shared.weight"], theirs["fit_dense.weight"])
    assert torch.equal(projection["layers_shared.bias"], theirs["fit_dense.bias"])
    tokenizer = AutoTokenizer.from_pretrained(out)
    assert tokenizer("WORD7 nothing")["input_ids"] == [2, 12, 1, 3]  # [CLS] word7 [UNK] [SEP]


def test_it_computes_what_the_published_encoder_does(tmp_path: Path) -> None:
    found = read_general_tinybert(write(tmp_path / "published", published()))
    ids = torch.tensor([[2, 9, 30, 3]])
    with torch.no_grad():
        expected = tiny_model("bert", num_layers=3, head="base")(input_ids=ids).last_hidden_state
        assert torch.allclose(found.model(input_ids=ids).last_hidden_state, expected, atol=1e-6)


def without(*names: str) -> dict[str, torch.Tensor]:
    return {name: tensor for name, tensor in published().items() if name not in names}


def of_the_second_version() -> dict[str, torch.Tensor]:
    """One map for each layer in place of one for all, the embeddings' first."""
    generator, theirs = torch.Generator().manual_seed(2), without("fit_dense.weight", "fit_dense.bias")
    for layer in range(4):
        theirs[f"fit_denses.{layer}.weight"] = torch.randn(32, 16, generator=generator)
        theirs[f"fit_denses.{layer}.bias"] = torch.randn(32, generator=generator)
    return theirs


def test_one_map_for_each_layer(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    theirs, out = of_the_second_version(), tmp_path / "student"
    assert main(["student", write(tmp_path / "published", theirs), "-o", str(out)]) == 0
    assert "4 projections, one for each layer and the embeddings, 16 -> 32" in capsys.readouterr().out
    stored = read_projections(out)
    assert stored.keys() == {f"layers_layer_{layer}.{part}" for layer in range(4) for part in ("weight", "bias")}
    guide = tiny_model("bert", num_layers=6, hidden_size=32, intermediate_size=48)
    trainer = DistillTrainer(
        AutoModelForSequenceClassification.from_pretrained(out),
        arguments(tmp_path / "run"),
        teacher=guide,
        losses=[EmbeddingsLoss(projection="per_layer"), HiddenStatesLoss(projection="per_layer")],
        train_dataset=rows(),
    )
    assert trainer.distillation is not None
    started = trainer.distillation.projections.state_dict()
    assert len(started) == 8
    for name, tensor in started.items():
        assert torch.equal(tensor, theirs[name.replace("layers_layer_", "fit_denses.")]), name


def test_other_models_are_not_taken_for_one(tmp_path: Path) -> None:
    tiny_model("bert", num_layers=3).save_pretrained(tmp_path / "bert")
    (tmp_path / "empty").mkdir()
    assert not is_general_tinybert(str(tmp_path / "bert"))
    assert not is_general_tinybert(str(tmp_path / "empty"))
    assert is_general_tinybert(write(tmp_path / "published", published()))


class Harm:
    """What a pickle can do."""

    def __reduce__(self) -> Any:
        return (os.mkdir, ("harm_was_done",))


@pytest.mark.parametrize(
    ("tensors", "options", "words"),
    [
        (without("fit_dense.bias", "bert.pooler.dense.bias"), {}, r"2 weights .* missing .*: bert.pooler.dense.bias, fit_dense.bias"),
        (
            {name: tensor for name, tensor in of_the_second_version().items() if "fit_denses.3" not in name},
            {},
            r"2 weights .* missing .*: fit_denses.3.weight, fit_denses.3.bias",
        ),
        (published(), {"intermediate_size": 20}, r"intermediate.dense.weight is \(24, 16\) .*, and \(20, 16\) by its config"),
        (published() | {"fit_dense.weight": torch.zeros(32, 8)}, {}, r"fit_dense.weight is \(32, 8\) .*, and \(32, 16\)"),
        (published(), {"num_attention_heads": 3}, "3 attention heads, which do not divide its hidden_size 16"),
        (published(), {"hidden_size": "16"}, "hidden_size is '16'; expected a whole number"),
        (published(), {"words": WORDS[:40]}, "vocab.txt .* has 40 words, and its config.json says vocab_size is 50"),
        ({"model": Harm()}, {}, "cannot be read as weights"),
        ([torch.zeros(2)], {}, "holds no weights by name, but a list"),
    ],
)
def test_a_broken_one_is_refused_and_nothing_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tensors: Any, options: dict[str, Any], words: str
) -> None:
    monkeypatch.chdir(tmp_path)
    source = write(tmp_path / "published", tensors, **options)
    with pytest.raises(ArgumentError, match=words):
        read_general_tinybert(source)
    assert main(["student", source, "-o", "student"]) == 2
    assert sorted(path.name for path in tmp_path.iterdir()) == ["published"]


@pytest.mark.parametrize("missing", ["vocab.txt", "pytorch_model.bin"])
def test_a_file_is_missing(tmp_path: Path, missing: str) -> None:
    source = write(tmp_path / "published", published())
    (tmp_path / "published" / missing).unlink()
    with pytest.raises(ArgumentError, match=missing.replace(".", r"\.")):
        read_general_tinybert(source)


def test_weights_that_were_cut_off(tmp_path: Path) -> None:
    source = write(tmp_path / "published", published())
    path = tmp_path / "published" / "pytorch_model.bin"
    path.write_bytes(path.read_bytes()[:2000])
    with pytest.raises(ArgumentError, match="cannot be read as weights: it is cut off"):
        read_general_tinybert(source)


def test_flags_that_would_change_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = write(tmp_path / "published", published())
    assert main(["student", source, "-o", str(tmp_path / "student"), "--num_hidden_layers", "2"]) == 2
    assert "a student as it is: --num_hidden_layers would change it" in capsys.readouterr().err
    assert not (tmp_path / "student").exists()
