from __future__ import annotations

import pytest
from transformers import PreTrainedModel

from hf_compress.errors import LayerDropError
from hf_compress.layers.drop import drop_layers
from hf_compress.layers.freeze import check_freeze, freeze
from hf_compress.layers.stack import find_stacks
from tests.tiny_models import ARCHITECTURES, tiny_model


def frozen(model: PreTrainedModel) -> set[str]:
    return {name for name, parameter in model.named_parameters() if not parameter.requires_grad}


@pytest.mark.parametrize(
    ("architecture", "prefixes"),
    [
        ("bert", ["bert.embeddings."]),
        ("distilbert", ["distilbert.embeddings."]),
        ("albert", ["albert.embeddings."]),
        ("mpnet", ["mpnet.embeddings."]),
        ("deberta-v2", ["deberta.embeddings."]),
        ("modernbert", ["model.embeddings."]),
        ("xlnet", ["transformer.word_embedding."]),
        ("gpt2", ["transformer.wte.", "transformer.wpe."]),
        ("llama", ["model.embed_tokens."]),
        ("bart", ["model.shared.", "model.encoder.embed_positions.", "model.decoder.embed_positions."]),
        ("t5", ["shared."]),
        ("vit", ["vit.embeddings."]),
    ],
)
def test_embeddings(architecture: str, prefixes: list[str]) -> None:
    model = tiny_model(architecture)
    freeze(model, embeddings=True)
    assert frozen(model) == {name for name, _ in model.named_parameters() if name.startswith(tuple(prefixes))}
    assert frozen(model)


@pytest.mark.parametrize("architecture", [name for name in ARCHITECTURES if name != "albert"])
def test_layers(architecture: str) -> None:
    model = tiny_model(architecture)
    freeze(model, layers=[1, 3])
    expected = {
        f"{stack.path}.{layer - 1}.{name}"
        for stack in find_stacks(model).values()
        for layer in (1, 3)
        for name, _ in stack.module(layer).named_parameters()
    }
    assert frozen(model) == expected


def test_numbers_are_those_of_the_full_model() -> None:
    before, after = tiny_model("bert", num_layers=6), tiny_model("bert", num_layers=6)
    freeze(before, layers=[2, 3, 6])
    drop_layers(before, layers_to_drop=[3, 4])
    drop_layers(after, layers_to_drop=[3, 4])
    freeze(after, layers=[2, 3, 6])
    assert frozen(before) == frozen(after) == {name for name, _ in after.named_parameters() if ".layer.1." in name or ".layer.3." in name}


def test_one_stack() -> None:
    model = tiny_model("bart")
    freeze(model, layers=[1], stack="decoder")
    assert {name.rpartition("layers.")[0] for name in frozen(model)} == {"model.decoder."}
    with pytest.raises(LayerDropError, match="'encoder' and 'decoder'"):
        freeze(model, layers=[1], stack="layers")


def test_shared_layers_freeze_together() -> None:
    model = tiny_model("albert")
    with pytest.raises(LayerDropError, match="share their weights"):
        freeze(model, embeddings=True, layers=[1])
    assert not frozen(model)
    freeze(model, layers=[1, 2, 3, 4])
    assert frozen(model) == {name for name, _ in model.named_parameters() if "albert_layer_groups" in name}


@pytest.mark.parametrize(("layers", "words"), [([0], "counted from 1"), ([5], "layers are 1 to 4"), ([2, 2], "twice")])
def test_refused_with_nothing_frozen(layers: list[int], words: str) -> None:
    model = tiny_model("bert")
    for call in (freeze, check_freeze):
        with pytest.raises(LayerDropError, match=words):
            call(model, layers=layers)
    with pytest.raises(LayerDropError, match=words):
        freeze(model, embeddings=True, layers=layers)
    assert not frozen(model)
