"""The model card: what it says is so, its header is one that the hub takes, and it gets there."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import ModelCard
from transformers import BertForSequenceClassification, Trainer

from hf_compress.arguments import CompressionArguments
from hf_compress.bound_trainer import trainer_of
from hf_compress.callbacks import LayerDropCallback
from hf_compress.cli.app import main
from hf_compress.errors import ArgumentError
from hf_compress.layers.drop import drop_layers
from hf_compress.trainer import DistillTrainer
from tests.cache.hub_server import HubServer
from tests.cached_runs import run
from tests.tiny_models import tiny_model
from tests.tiny_runs import NARROW, arguments, rows, student, teacher


def accuracy(prediction: Any) -> dict[str, float]:
    return {"accuracy": float((prediction.predictions.argmax(-1) == prediction.label_ids).mean())}


def card(folder: Path) -> tuple[ModelCard, dict[str, str], str]:
    """The card, as the hub's own library reads it, the rows of its table, and its text."""
    path = folder / "README.md"
    found = ModelCard.load(path)
    cells = [line.strip("| ").split(" | ", 1) for line in found.text.splitlines() if line.startswith("| ") and " | " in line]
    return found, {cell[0]: cell[1] for cell in cells if len(cell) == 2}, found.text


def distilled(folder: Path, settings: dict[str, Any] | None = None, **flags: Any) -> DistillTrainer:
    pupil, guide = tiny_model("bert", num_layers=4, seed=2, **NARROW), teacher()
    guide.config._name_or_path = "someone/bert-mrpc"
    drop_layers(pupil, strategy="symmetric", num_layers_to_drop=2)
    trainer = DistillTrainer(
        pupil,
        arguments(folder, eval_strategy="steps", eval_steps=1, **settings or {}),
        teacher=guide,
        compression=CompressionArguments(**flags),
        train_dataset=rows(),
        eval_dataset=rows(),
        compute_metrics=accuracy,
    )
    trainer.train()
    return trainer


def test_the_card_of_a_distilled_student(tmp_path: Path) -> None:
    trainer = distilled(tmp_path, distill_recipe="tinybert", distill_weights="labels=0.5")
    origin = tmp_path / "my student"
    origin.mkdir()
    given = {"finetuned_from": str(origin), "license": "apache-2.0", "tasks": "text-classification", "dataset": "GLUE MRPC"}
    for _ in range(2):  # a second one takes the place of the first
        trainer.create_model_card(**given, dataset_tags="nyu-mll/glue", tags="mine", measure_latency=True)
    found, cells, text = card(tmp_path)
    data = found.data.to_dict()
    assert data["license"] == "apache-2.0" and data["datasets"] == ["nyu-mll/glue"] and data["metrics"] == ["accuracy"]
    assert data["base_model"] == "someone/bert-mrpc"  # a folder of this machine is nothing that the hub takes
    assert {"mine", "generated_from_trainer", "hf_compress", "layer-dropping", "distillation"} <= set(data["tags"])
    assert len(data["tags"]) == len(set(data["tags"]))

    linked = "[someone/bert-mrpc](https://huggingface.co/someone/bert-mrpc)"
    assert f"\nThis model is a student of the teacher {linked}, trained on the GLUE MRPC dataset.\n" in text
    assert str(tmp_path) not in text and text.count("## Compression") == 1 and "## Training procedure" in text
    counts = [
        sum(p.numel() for name, p in m.named_parameters() if "projections" not in name) for m in (trainer.model, trainer._teachers[0].model)
    ]
    assert cells["model"] == "BertForSequenceClassification, 2 layers x 8, 2 heads"
    assert cells["layers"] == "kept 1 and 4 of 4, dropped 2-3 (symmetric)"
    assert cells["teacher"] == f"{linked}, BertForSequenceClassification, 4 layers x 16, 2 heads"
    assert cells["recipe"] == "tinybert"
    assert trainer.distillation is not None
    assert cells["losses"] == "<br>".join(str(loss) for loss in trainer.distillation.losses)
    assert "1 x logits (soft_cross_entropy, T = 1)<br>0.5 x labels" in cells["losses"]
    share = f"{counts[0] / counts[1]:.1%}, {counts[1] / counts[0]:.1f} times smaller"
    assert cells["parameters"] == f"{counts[0]:,} of the teacher's {counts[1]:,}: {share}"
    assert cells["size"].startswith(f"{4 * counts[0]:,} bytes in float32, the teacher {4 * counts[1]:,} bytes in float32")
    assert cells["data"] == "16 training examples, GLUE MRPC"
    line = next(line for line in trainer.state.log_history if "eval_accuracy" in line)
    own, theirs = line["eval_accuracy"], trainer.state.log_history[0]["teacher_accuracy"]
    assert cells["score"] == f"accuracy {own:.4g}, the teacher {theirs:.4g}, {own / theirs:.1%} of it"
    assert "ms for a batch of 8 x 24, the teacher " in cells["time"] and "CPU" in cells["time"]
    for paper in ("2004.03844", "1909.10351"):
        assert f"https://arxiv.org/abs/{paper}" in text and f"eprint = {{{paper}}}" in text


def test_the_card_of_a_student_taught_from_disk_says_so(tmp_path: Path) -> None:
    guide = teacher()
    guide.save_pretrained(tmp_path / "my-teacher")
    trainer = run(tmp_path, teacher_model_name_or_path=str(tmp_path / "my-teacher"), losses=None, distill_recipe="mud", model=student())
    trainer.create_model_card()
    _, cells, text = card(tmp_path / "out")
    assert cells["teacher"].startswith("`my-teacher`, BertForSequenceClassification, 4 layers x 16, 2 heads; from disk, hidden states all")
    assert cells["recipe"] == "mud" and "2106.05691" in text and "time" not in cells
    assert f"of the teacher's {guide.num_parameters():,}:" in cells["parameters"]
    assert "base_model" not in ModelCard.load(tmp_path / "out" / "README.md").data.to_dict()


def test_the_card_names_each_of_several_teachers(tmp_path: Path) -> None:
    guides = [teacher(), tiny_model("bert", num_layers=3, seed=9)]
    trainer = DistillTrainer(student(), arguments(tmp_path), teacher=guides, teacher_weights=[0.7, 0.3], train_dataset=rows())
    trainer.train()
    trainer.state.log_history += [{"teacher_1_accuracy": 0.75, "teacher_2_accuracy": 0.5}, {"eval_accuracy": 0.625}]
    trainer.create_model_card()
    _, cells, text = card(tmp_path)
    assert "This model is a student of 2 teachers" in text and cells["score"] == "accuracy 0.625, teacher 1 0.75, teacher 2 0.5"
    assert cells["teacher 1"].startswith("BertForSequenceClassification, 4 layers") and "teacher" not in cells
    assert cells["teacher 2"].startswith("BertForSequenceClassification, 3 layers")


@pytest.mark.parametrize("way", ["run", "callback"])
def test_layers_dropped_in_a_plain_trainer(way: str, tmp_path: Path) -> None:
    model = tiny_model("bert", num_layers=4)
    if way == "run":
        trainer = trainer_of(CompressionArguments(layer_drop_strategy="top")).trainer_class(
            model, arguments(tmp_path), train_dataset=rows()
        )
    else:
        trainer = Trainer(model, arguments(tmp_path), train_dataset=rows(), callbacks=[LayerDropCallback("top")])
    trainer.create_model_card(tags=list(trainer.model.model_tags))
    found, cells, text = card(tmp_path)
    assert {"hf_compress", "layer-dropping"} <= set(found.data.tags)
    if way == "run":
        assert cells["layers"] == "kept 1-3 of 4, dropped 4 (top)" and "2004.03844" in text and "distillation" not in found.data.tags
        left, whole = model.num_parameters(), tiny_model("bert", num_layers=4).num_parameters()
        assert cells["parameters"].startswith(f"{left:,} of the full model's {whole:,}: {left / whole:.1%}")


def test_a_trainer_that_compressed_nothing_writes_the_plain_card(tmp_path: Path) -> None:
    frozen = trainer_of(CompressionArguments(freeze_embeddings=True)).trainer_class
    texts = []
    for trainer in (made(student(), arguments(tmp_path / "out")) for made in (Trainer, frozen)):
        trainer.create_model_card()
        texts.append((tmp_path / "out" / "README.md").read_text())
    assert texts[0] == texts[1] and "hf_compress" not in texts[0]
    with pytest.raises(ArgumentError, match="nothing was compressed"):
        trainer.create_model_card(measure_latency=True)


def test_pushing_to_the_hub_goes_through(hub: HubServer, tmp_path: Path) -> None:
    settings = {"push_to_hub": True, "hub_strategy": "all_checkpoints", "save_strategy": "steps", "save_steps": 1}
    trainer = distilled(tmp_path / "small-mrpc", settings)
    assert {"config.json", "checkpoint-1/model.safetensors", "checkpoint-1/distill_projections.safetensors"} <= set(
        hub.files("me/small-mrpc")
    )
    trainer.state.log_history = trainer.state.log_history[1:]  # as where --logging_steps is more than there are steps
    trainer.push_to_hub(dataset_tags="nyu-mll/glue", measure_latency=True)
    files = hub.files("me/small-mrpc")
    assert {"README.md", "config.json", "model.safetensors", "distill_projections.safetensors"} <= set(files)
    assert all(words in files["README.md"] for words in (b"## Compression", b"ms for a batch", b"| score | accuracy 0.5, the teacher 0."))
    assert ModelCard(files["README.md"].decode()).data.base_model == "someone/bert-mrpc"
    assert "POST /api/validate-yaml" in hub.requests
    for name in ("config.json", "model.safetensors"):
        (tmp_path / "back" / name).parent.mkdir(exist_ok=True)
        (tmp_path / "back" / name).write_bytes(files[name])
    back = BertForSequenceClassification.from_pretrained(tmp_path / "back")
    assert back.config.num_hidden_layers == 2
    assert back.config.hf_compress["layer_drop"]["layers"]["kept"] == [1, 4]


def test_what_the_commands_write_has_a_card(tmp_path: Path) -> None:
    source = tmp_path / "bert-mrpc"
    tiny_model("bert", num_layers=4).save_pretrained(source)
    commands = {
        "drop": ["--layers_to_drop", "2-3"],
        "student": ["--num_hidden_layers", "2", "--hidden_size", "8", "--num_attention_heads", "2", "--intermediate_size", "12"],
        "prune": ["--num_hidden_layers", "3", "--embedding_rank", "4"],
    }
    for command, flags in commands.items():
        assert main([command, str(source), "-o", str(tmp_path / command), *flags]) == 0
        found, cells, text = card(tmp_path / command)
        assert cells["made of"] == "`bert-mrpc`, BertForSequenceClassification, 4 layers x 16, 2 heads"
        assert "of the source's" in cells["parameters"] and "hf_compress" in found.data.tags and str(tmp_path) not in text
    assert card(tmp_path / "drop")[1]["layers"] == "kept 1 and 4 of 4, dropped 2-3"
    assert "layers" not in card(tmp_path / "student")[1]
    pruned = card(tmp_path / "prune")
    assert pruned[1]["pruned"].endswith("embeddings of rank 4 of 16") and "2103.11367" in pruned[2]
