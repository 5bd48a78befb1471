from __future__ import annotations

from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import BertConfig, BertModel, EncoderDecoderConfig, EncoderDecoderModel, XLMConfig, XLMModel

from hf_compress.errors import LayerDropError
from hf_compress.layers.stack import find_stacks, pretrained_model, unwrap
from tests.tiny_models import ARCHITECTURES, BERT_LIKE, tiny_batch, tiny_model


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_stacks_of_every_architecture(architecture: str) -> None:
    model = tiny_model(architecture, num_layers=3)
    stacks = find_stacks(model)
    assert list(stacks) == (["encoder", "decoder"] if architecture in ("t5", "bart") else ["layers"])
    for name, stack in stacks.items():
        assert stack.name == name
        assert stack.depth == 3
        assert stack.shared == (architecture == "albert")
        assert len(stack.modules) == (1 if stack.shared else 3)
        assert stack.time_major == (architecture == "xlnet")
        assert stack.causal == (architecture in ("gpt2", "llama", "qwen3") or name == "decoder")
        last = architecture in ("gpt2", "llama", "qwen3", "xlnet") or name == "decoder"
        assert stack.summary_token == ("last" if last else "first")


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_layers_are_called_in_order_and_depth_times(architecture: str) -> None:
    model = tiny_model(architecture, num_layers=3)
    for stack in find_stacks(model).values():
        called: list[nn.Module] = []
        handles = [module.register_forward_hook(lambda module, *_, called=called: called.append(module)) for module in stack.modules]
        with torch.no_grad():
            model(**tiny_batch(model))
        for handle in handles:
            handle.remove()
        assert called == [stack.module(layer) for layer in (1, 2, 3)]


def test_encoder_and_decoder_of_different_depths() -> None:
    for architecture, names in (("t5", ("num_layers", "num_decoder_layers")), ("bart", ("encoder_layers", "decoder_layers"))):
        model = tiny_model(architecture, **dict(zip(names, (2, 3), strict=True)))
        assert {name: stack.depth for name, stack in find_stacks(model).items()} == {"encoder": 2, "decoder": 3}


def test_two_berts_as_encoder_and_decoder() -> None:
    config = EncoderDecoderConfig.from_encoder_decoder_configs(
        BertConfig(vocab_size=50, num_hidden_layers=2, **BERT_LIKE), BertConfig(vocab_size=50, num_hidden_layers=3, **BERT_LIKE)
    )
    stacks = find_stacks(EncoderDecoderModel(config))
    assert {name: (stack.depth, stack.causal) for name, stack in stacks.items()} == {"encoder": (2, False), "decoder": (3, True)}


@pytest.mark.parametrize("architecture", ["bert", "t5", "albert"])
def test_through_a_peft_wrapper(architecture: str) -> None:
    model = tiny_model(architecture)
    modules = {name: stack.modules for name, stack in find_stacks(model).items()}
    wrapped: Any = get_peft_model(model, LoraConfig(target_modules=["q"] if architecture == "t5" else ["query"]))
    assert unwrap(wrapped) is model
    assert {name: stack.modules for name, stack in find_stacks(wrapped).items()} == modules


def test_through_other_wrappers() -> None:
    model = tiny_model("bert")

    class Classifier(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = model

    assert unwrap(nn.DataParallel(model)) is model
    assert pretrained_model(Classifier()) is model
    assert find_stacks(Classifier())["layers"].depth == 4


def test_a_group_of_shared_layers_is_found_by_its_layer() -> None:
    stack = find_stacks(tiny_model("albert", num_layers=6, num_hidden_groups=2))["layers"]
    assert [stack.modules.index(stack.module(layer)) for layer in range(1, 7)] == [0, 0, 0, 1, 1, 1]


def test_one_layer_is_a_stack_too() -> None:
    assert find_stacks(tiny_model("bert", num_layers=1))["layers"].depth == 1


def test_models_without_layers() -> None:
    with pytest.raises(LayerDropError, match="holds no transformers model"):
        find_stacks(nn.Linear(2, 2))
    model = BertModel(BertConfig(vocab_size=50, num_hidden_layers=2, **BERT_LIKE))
    model.config.num_hidden_layers = 7
    with pytest.raises(LayerDropError, match="no list of modules is as long"):
        find_stacks(model)


def test_parallel_lists_are_refused() -> None:
    model = XLMModel(XLMConfig(vocab_size=50, emb_dim=16, n_layers=2, n_heads=2, max_position_embeddings=20))
    with pytest.raises(LayerDropError, match="parallel lists"):
        find_stacks(model)
