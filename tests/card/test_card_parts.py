"""What a card is made of: papers, sizes, times, and the place in a text that is there already."""

from __future__ import annotations

from pathlib import Path
from typing import get_args

import torch
from huggingface_hub import ModelCard

from hf_compress.card.facts import score_row
from hf_compress.card.latency import milliseconds_per_batch
from hf_compress.card.papers import DROPPING, OF_LOSS, OF_RECIPE, PRUNING, papers_of, unique
from hf_compress.card.section import BEGIN, CardSection, complete_card, is_on_hub, named
from hf_compress.card.sizes import size_of
from hf_compress.losses.recipes import RECIPES, LossName
from tests.tiny_models import tiny_batch, tiny_model


def test_every_recipe_and_every_loss_has_its_papers() -> None:
    assert set(OF_RECIPE) == set(RECIPES) and set(OF_LOSS) == set(get_args(LossName))
    for name, recipe in RECIPES.items():
        ids = [paper.arxiv for paper in papers_of(name, [])]
        assert ids and (name == "layerwise" or ids[0] in (recipe.__doc__ or "")), name
    papers = unique([DROPPING, PRUNING, *(paper for each in (*OF_RECIPE.values(), *OF_LOSS.values()) for paper in each)])
    keys = [paper.bibtex.partition(",")[0] for paper in papers]
    assert len(set(keys)) == len(keys) and keys[0] == "@misc{sajjad2020on"
    assert papers_of(None, ["logits", "labels", "hidden_states", "embeddings"]) == (*OF_LOSS["logits"], *OF_LOSS["hidden_states"])


def test_a_card_of_ones_own_keeps_its_words(tmp_path: Path) -> None:
    path = tmp_path / "README.md"
    path.write_text("---\nlicense: mit\nbase_model: /home/me/bert\ntags: nice\n---\n\n# Mine\n\nI made it.\n\n## Use\n\nWith care.\n")
    for words in ("kept 1 of 2", "kept 2 of 2"):
        complete_card(tmp_path, CardSection("Made of a model", {"layers": words, "time": ""}, ("layer-dropping",), (DROPPING,)))
    text = path.read_text()
    assert text.index("I made it.") < text.index(BEGIN) < text.index("| layers | kept 2 of 2 |") < text.index("## Use\n\nWith care.\n")
    assert "kept 1" not in text and "| time" not in text and text.count("@misc") == 1
    assert ModelCard.load(path).data.to_dict() == {"license": "mit", "tags": ["nice", "hf_compress", "layer-dropping"]}


def test_tags_that_name_a_folder_of_this_machine_are_left_out(tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text(
        "---\ntags: [lora, 'base_model:adapter:/tmp/x/base_model', 'base_model:adapter:someone/bert']\n---\n\n# A\n"
    )
    complete_card(tmp_path, CardSection("Made of a model", {}, ("layer-dropping",)))
    tags = ["lora", "base_model:adapter:someone/bert", "hf_compress", "layer-dropping"]
    assert ModelCard.load(tmp_path / "README.md").data.tags == tags


def test_a_card_is_made_where_there_is_none(tmp_path: Path) -> None:
    complete_card(tmp_path, CardSection("Made of a model", {"layers": "kept 1 of 2"}, (), base_model=("a/b", "c")))
    assert ModelCard.load(tmp_path / "README.md").data.base_model == ["a/b", "c"]


def test_what_may_be_on_the_hub(tmp_path: Path) -> None:
    assert is_on_hub("someone/bert") and is_on_hub("bert-base-uncased")
    for name in ("", str(tmp_path), "./out", "~/out", "a/b/c", "/gone/bert", "two words"):
        assert not is_on_hub(name), name
    assert named("/home/me/bert-mrpc/") == "`bert-mrpc`"


def test_the_score_is_of_the_last_evaluation() -> None:
    history = [{"loss": 1.0, "teacher_f1": 0.8}, {"eval_f1": 0.2, "eval_loss": 1.0}, {"eval_f1": 0.6, "eval_loss": 1.0}]
    assert score_row(history, {}) == "f1 0.6, the teacher 0.8, 75.0% of it"
    assert score_row(history[1:], {"teacher_f1": 0.5}) == "f1 0.6, the teacher 0.5, 120.0% of it"
    steps = [{"eval_f1": 0.9, "step": 1}, {"eval_f1": 0.3, "step": 2}, {"train_runtime": 1.0, "step": 2}]
    assert score_row(steps, {"teacher_f1": 1.0}, best_step=1).startswith("f1 0.9")  # the model that was loaded at the end
    assert score_row([*steps, {"eval_f1": 0.8, "step": 2}], {"teacher_f1": 1.0}, best_step=1).startswith("f1 0.8")
    assert score_row(history[1:], {}) == score_row([], {"teacher_f1": 0.5}) == ""


def test_sizes_and_times() -> None:
    shallow, deep = tiny_model("t5", num_layers=1), tiny_model("bert", num_layers=24)
    size = size_of(shallow)
    assert size.words == "T5ForConditionalGeneration, 1 layer x 16 (encoder), 2 heads, 1 layer x 16 (decoder), 2 heads"
    assert size.parameters == shallow.num_parameters() and size.size == 4 * size.parameters
    assert size_of(tiny_model("bert").half()).dtype == "float16"
    batch = tiny_batch(deep)
    times = milliseconds_per_batch({"one": tiny_model("bert", num_layers=1).train(), "many": deep}, {**batch, "unknown": torch.ones(3)})
    assert 0 < 3 * times["one"] < times["many"]
