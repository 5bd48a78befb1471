"""Recipes: the losses of each, and what flags put into them."""

from __future__ import annotations

from typing import get_args

import pytest

from hf_compress.arguments import CompressionArguments, LossName, RecipeName
from hf_compress.errors import ArgumentError, LossError
from hf_compress.layers.layer_map import LayerMap
from hf_compress.losses.attention_scores import AttentionScoresLoss
from hf_compress.losses.hidden_states import HiddenStatesLoss
from hf_compress.losses.logits import LogitsLoss
from hf_compress.losses.recipes import DEFAULT_RECIPE, LOSSES, RECIPES, losses_of
from hf_compress.task import ModelShape, Stack
from hf_compress.teacher_side import recipe_of


def weights_of(recipe: str, **settings: object) -> dict[str, float]:
    return {loss.name: loss.weight for loss in losses_of(recipe, **settings)}


def test_the_recipes_of_the_papers() -> None:
    assert weights_of("logits") == {"logits": 1.0, "labels": 0.5}
    assert weights_of("distilbert") == {"logits": 5.0, "labels": 2.0, "hidden_states": 1.0}
    assert weights_of("tinybert") == {"embeddings": 1.0, "hidden_states": 1.0, "attention_scores": 1.0, "logits": 1.0}
    assert weights_of("pkd") == {"labels": 0.5, "logits": 0.5, "hidden_states": 100.0}
    assert weights_of("mud") == {"hidden_states": 1.0, "logits": 1.0}
    assert weights_of("layerwise") == {"logits": 1.0, "hidden_states": 10.0, "attention_scores": 1.0}
    assert weights_of("minilm") == {"attentions": 1.0, "value_relations": 1.0, "logits": 1.0}
    assert weights_of("minilmv2") == {"query_relations": 1 / 3, "key_relations": 1 / 3, "value_relations": 1 / 3, "logits": 1.0}
    assert weights_of("fitnets") == {"hint": 1.0, "logits": 4.0, "labels": 1.0}
    assert weights_of("ckd") == {"combined_layers": 0.7, "logits": 0.2, "labels": 0.1}
    assert weights_of("alp") == {"mixed_layers": 1.0, "logits": 1.0, "labels": 1.0}
    assert weights_of("emd") == {
        "embeddings": 1.0,
        "hidden_states_transport": 1.0,
        "attention_scores_transport": 1.0,
        "logits": 1.0,
    }
    assert weights_of("mobilebert") == {"hidden_states": 1.0, "attentions": 1.0, "logits": 0.5, "labels": 0.5}


@pytest.mark.parametrize(
    ("recipe", "pairs"),
    [
        ("distilbert", "3:9"),
        ("mud", "1:3,2:6,3:9"),
        ("pkd", "1:3,2:6"),
        ("tinybert", "1:3,2:6,3:9"),
        ("fitnets", "2:6"),
        ("mobilebert", "1:3,2:6,3:9"),
    ],
)
def test_which_layers_a_paper_compares(recipe: str, pairs: str) -> None:
    def shape(layers: int) -> ModelShape:
        return ModelShape("Model", "sequence_classification", {"layers": Stack(layers, 12, 2)})

    (states,) = [loss for loss in losses_of(recipe) if isinstance(loss, HiddenStatesLoss) and loss.name != "embeddings"]
    (resolved,) = states.resolve(shape(3), shape(9))
    assert isinstance(resolved, HiddenStatesLoss)
    assert str(resolved.layer_map) == pairs


@pytest.mark.parametrize("recipe", ["minilm", "minilmv2"])
def test_relations_are_of_the_last_layers_or_those_a_map_names(recipe: RecipeName) -> None:
    shape = ModelShape("Model", "sequence_classification", {"layers": Stack(6, 12, 2)})
    for layer_map, pair in ((None, "6:6"), ("4:5", "4:5"), ("bottom", "6:6")):
        losses = [loss for loss in losses_of(recipe, layer_map=layer_map) if loss.name != "logits"]
        resolved = [one for loss in losses for one in loss.resolve(shape, shape)]
        assert len(resolved) == len(losses) >= 2 and {str(getattr(loss, "layer_map", "")) for loss in resolved} == {pair}


def test_a_setting_that_no_loss_uses_is_refused() -> None:
    with pytest.raises(ArgumentError, match="--distill_layer_map would have no effect: the losses are logits, labels"):
        losses_of("logits", layer_map="top")


def test_flags_and_recipes_know_the_same_names() -> None:
    assert set(get_args(RecipeName)) == set(RECIPES)
    assert get_args(RecipeName)[0] == DEFAULT_RECIPE
    assert set(get_args(LossName)) == set(LOSSES)
    assert {name: make(None).name for name, make in LOSSES.items()} == {name: name for name in LOSSES}
    assert {loss.name for make in RECIPES.values() for loss in make(None)} == set(LOSSES)  # each has its recipe


@pytest.mark.parametrize("recipe", ["ckd", "alp", "emd", "logits"])
def test_a_layer_map_is_refused_where_a_loss_chooses_layers_itself(recipe: RecipeName) -> None:
    with pytest.raises(ArgumentError, match="--distill_layer_map would have no effect"):
        losses_of(recipe, layer_map="top")


def test_relation_heads_reach_the_relations() -> None:
    losses = losses_of("minilmv2", relation_heads=24)
    assert [getattr(loss, "relation_heads", None) for loss in losses] == [24, 24, 24, None]
    with pytest.raises(ArgumentError, match="--distill_relation_heads would have no effect"):
        losses_of("tinybert", relation_heads=24)
    flags = CompressionArguments(distill_recipe="minilmv2", distill_relation_heads=12, distill_weights="query_relations=0")
    assert [getattr(loss, "relation_heads", None) for loss in recipe_of(flags, {})] == [12, 12, None]
    with pytest.raises(ArgumentError, match=r"--distill_relation_heads is 0; expected a whole number"):
        CompressionArguments(distill_relation_heads=0)


def test_weights_replace_add_and_leave_out() -> None:
    assert weights_of("logits", weights={"labels": 0, "hidden_states": 3}) == {"logits": 1.0, "hidden_states": 3}
    with pytest.raises(ArgumentError, match="nothing to learn from"):
        losses_of("logits", weights={"logits": 0, "labels": 0})


def test_settings_reach_the_losses() -> None:
    layer_map = LayerMap(((1, 2),))
    losses = losses_of("tinybert", layer_map=layer_map, temperature=7.0, skip_heads=0.4)
    assert [loss.temperature for loss in losses if isinstance(loss, LogitsLoss)] == [7.0]
    assert [loss.skip_heads for loss in losses if isinstance(loss, AttentionScoresLoss)] == [0.4]
    assert [loss.layer_map for loss in losses if type(loss) is HiddenStatesLoss] == [layer_map]


def test_the_default_does_without_attention_where_heads_differ_but_not_silently_when_asked() -> None:
    def shape(heads: int) -> ModelShape:
        return ModelShape("Model", "sequence_classification", {"layers": Stack(2, 12, heads)})

    (attention,) = [loss for loss in losses_of() if isinstance(loss, AttentionScoresLoss)]
    assert attention.resolve(shape(2), shape(3)) == ()
    assert len(attention.resolve(shape(2), shape(2))) == 1
    (asked,) = [loss for loss in losses_of(weights={"attention_scores": 2.0}) if isinstance(loss, AttentionScoresLoss)]
    with pytest.raises(LossError, match="head by head"):
        asked.resolve(shape(2), shape(3))
