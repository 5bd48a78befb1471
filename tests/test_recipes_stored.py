"""Every recipe from a teacher on disk: the losses and the weights of a live run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from hf_compress.cached_teacher import CachedTeacher
from hf_compress.cli.app import main
from hf_compress.errors import ArgumentError, CacheError, LossError
from hf_compress.losses.recipes import RECIPES, RecipeName, losses_of
from hf_compress.losses.relations import ValueRelationsLoss
from tests.cached_runs import Recording, cached, data, refused, run, tokenizer
from tests.tiny_models import tiny_model
from tests.tiny_runs import NARROW, arguments, largest_difference, student, teacher, weights

STEPS: dict[str, Any] = {"max_steps": 4, "per_device_train_batch_size": 4, "learning_rate": 0.02, "gradient_accumulation_steps": 2}


def live(folder: Path, recipe: RecipeName, model: nn.Module, guide: nn.Module) -> Recording:
    torch.manual_seed(5)  # projections are random, here and in `cached`
    trainer = Recording(
        model,
        arguments(folder / "live", **STEPS),
        teacher=guide,
        losses=losses_of(recipe),
        train_dataset=data(),
        processing_class=tokenizer(),
    )
    trainer.train()
    return trainer


@pytest.mark.parametrize("recipe", RECIPES)
def test_every_recipe_trains_from_disk_as_live(recipe: RecipeName, tmp_path: Path) -> None:
    start = {name: parameter.detach().clone() for name, parameter in student(**NARROW).named_parameters()}
    there = live(tmp_path, recipe, student(**NARROW), teacher())
    here = cached(tmp_path, student(**NARROW), teacher(), losses=losses_of(recipe), **STEPS)
    assert here.distillation is not None and isinstance(here.distillation.teacher, CachedTeacher)
    assert [here.values[step] for step in range(4)] == pytest.approx([there.values[step] for step in range(4)], rel=2e-6, abs=2e-6)
    ours, theirs = weights(here), weights(there)
    assert largest_difference(ours, theirs) < 2e-6
    assert largest_difference({name: ours[name] for name in start}, start) > 1e-4
    names = {f"loss_{loss.name}" for loss in losses_of(recipe)}
    assert names <= here.state.log_history[0].keys()


@pytest.mark.parametrize("recipe", ["minilm", "minilmv2"])
def test_relations_of_models_of_other_families(recipe: RecipeName, tmp_path: Path) -> None:
    """A DistilBERT learns from a BERT; a Llama, whose heads share their keys and values, from a Llama."""
    pupil = tiny_model("distilbert", num_layers=2, seed=2, dim=8, hidden_dim=12)
    trainer = cached(tmp_path / "bert", pupil, teacher(), losses=losses_of(recipe), **STEPS)
    assert len(trainer.values) == 4
    pupil, guide = (tiny_model("llama", num_layers=layers, seed=2, num_labels=2) for layers in (2, 4))
    trainer = cached(tmp_path / "llama", pupil, guide, losses=losses_of(recipe), **STEPS)
    first, last = trainer.values[0], trainer.values[3]
    assert last < first


@pytest.mark.parametrize("recipe", ["pkd", "ckd", "alp", "emd"])
def test_part_of_the_states_is_refused_before_anything_is_stored(recipe: RecipeName, tmp_path: Path) -> None:
    refused(tmp_path, LossError, "needs them whole", guide=teacher(), losses=None, distill_recipe=recipe, hidden_states_selection="3t")
    assert not (tmp_path / "cache" / "manifest.json").exists()
    run(tmp_path, teacher(), losses=None, distill_recipe=recipe)  # and all of them will do


@pytest.mark.parametrize("recipe", ["ckd", "alp", "emd"])
def test_a_choice_of_layers_does_not_go_with_a_rule_for_them(recipe: RecipeName, tmp_path: Path) -> None:
    refused(tmp_path, LossError, "has a rule of its own", guide=teacher(), losses=None, distill_recipe=recipe, hidden_states_selection="1l")


def test_what_is_stored_of_attention_can_be_read_off_the_cache(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run(tmp_path, teacher(), losses=None, distill_recipe="minilmv2", distill_layer_map="2:3")
    cache = str(tmp_path / "cache")
    assert main(["cache", "info", cache]) == 0
    assert "queries of layer 3; keys of layer 3; values of layer 3" in " ".join(capsys.readouterr().out.split())
    assert main(["cache", "view", cache, "-o", str(tmp_path / "smaller"), "--teacher_cache_dtype", "int8"]) == 0
    later = run(tmp_path / "later", None, losses=None, teacher_cache_dir=str(tmp_path / "smaller"))  # recipe and map are the cache's
    assert "loss_key_relations" in later.state.log_history[0]
    message = refused(tmp_path / "other", CacheError, teacher_cache_dir=cache, losses=[ValueRelationsLoss("2:4")])
    assert "ask for attention_vectors.layers.4.values" in message and "attention_vectors.layers.3.values" in message


@pytest.mark.parametrize("recipe", ["logits", "minilm", "minilmv2"])
def test_part_of_states_that_nobody_compares_is_refused(recipe: RecipeName, tmp_path: Path) -> None:
    words = "--hidden_states_selection 3t would have no effect"
    refused(tmp_path, ArgumentError, words, guide=teacher(), losses=None, distill_recipe=recipe, hidden_states_selection="3t")
    assert not (tmp_path / "cache" / "manifest.json").exists()
    run(tmp_path, teacher(), losses=None, distill_recipe=recipe, hidden_states_selection="all")  # the default
    refused(tmp_path, ArgumentError, words, guide=None, losses=None, distill_recipe=recipe, hidden_states_selection="3t")
