"""What Capture shows, against what transformers itself shows and against a plain computation."""

from __future__ import annotations

import pytest
import torch

from hf_compress.attention import attention_scores
from hf_compress.capture import Capture
from hf_compress.errors import LossError
from hf_compress.layers.stack import find_stacks
from hf_compress.signals import VECTOR_KINDS, AttentionScores, AttentionVectors, HiddenState, SignalSpec
from hf_compress.task import ModelShape
from tests.tiny_models import ARCHITECTURES, tiny_batch, tiny_model

# Where output_hidden_states ends with the raw output of the last layer; the others put their final norm on it first.
WITHOUT_FINAL_NORM = ["bert", "roberta", "distilbert", "xlnet", "electra", "albert", "deberta-v2", "mpnet"]
# Attention taken from transformers' registry, with nothing but a mask added to the scores; to T5's its bias of positions, which is shown.
WITH_SCORES = ["bert", "roberta", "distilbert", "electra", "albert", "gpt2", "llama", "qwen3", "bart", "vit", "t5"]
WITHOUT_SCORES = ["xlnet", "deberta-v2", "mpnet"]


def all_states(model: torch.nn.Module) -> SignalSpec:
    stacks = find_stacks(model)
    return SignalSpec(hidden_states=frozenset(HiddenState(name, layer) for name in stacks for layer in range(stacks[name].depth + 1)))


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_hidden_states_are_those_of_transformers(architecture: str) -> None:
    model = tiny_model(architecture)
    batch = tiny_batch(model)
    with torch.no_grad():
        expected = model(**batch, output_hidden_states=True)
        spec = all_states(model)
        capture = Capture(model, spec, only_in_training=False)
        outputs = model(**batch)
    states = capture.signals(outputs).hidden_states
    assert isinstance(outputs, dict) and type(outputs) is dict
    for stack in find_stacks(model).values():
        theirs = getattr(expected, f"{stack.name}_hidden_states", None) or expected.hidden_states
        for layer in range(stack.depth if architecture not in WITHOUT_FINAL_NORM else stack.depth + 1):
            if architecture == "deberta-v2-conv" and layer == 1:
                continue  # transformers adds the convolution, which is no part of layer 1, before it shows the state
            ours = states[HiddenState(stack.name, layer)]
            assert torch.equal(ours, theirs[layer]), (stack.name, layer)
    capture.remove()
    assert type(model(**batch)) is not dict


@pytest.mark.parametrize("architecture", WITH_SCORES)
def test_scores_become_the_probabilities_of_eager_attention(architecture: str) -> None:
    model = tiny_model(architecture)
    batch = tiny_batch(model)
    eager = tiny_model(architecture)
    eager.set_attn_implementation("eager")
    stacks = find_stacks(model)
    with torch.no_grad():
        plain = model(**batch).logits
        keys = [AttentionScores(name, layer) for name in stacks for layer in range(1, stacks[name].depth + 1)]
        spec = SignalSpec(attention_scores=frozenset(keys))
        outputs = Capture(model, spec, only_in_training=False)
        got = model(**batch)
        expected = eager(**batch, output_attentions=True)
    assert torch.equal(got["logits"], plain), "listening must not change a bit"
    for key, scores in outputs.signals(got).attention_scores.items():
        names = {"encoder": "encoder_attentions", "decoder": "decoder_attentions"}
        probabilities = getattr(expected, names.get(key.stack, "attentions"))[key.layer - 1]
        visible = probabilities > 0  # eager attention gives masked keys exactly 0
        mine = scores.masked_fill(~visible, float("-inf")).softmax(-1)
        rows = visible.any(-1)
        assert torch.allclose(mine[rows], probabilities[rows], atol=1e-5), key


@pytest.mark.parametrize("architecture", WITHOUT_SCORES)
def test_models_with_attention_of_their_own_are_refused(architecture: str) -> None:
    with pytest.raises(LossError, match="does not take its attention function"):
        Capture(tiny_model(architecture), SignalSpec(attention_scores=frozenset({AttentionScores("layers", 1)})))


def test_scores_by_hand() -> None:
    query, key = torch.tensor([[[[1.0, 2.0]]]]), torch.tensor([[[[3.0, 4.0], [1.0, 0.0]]]])
    assert torch.allclose(attention_scores(query, key, None), torch.tensor([[[[11.0, 1.0]]]]) / 2**0.5)
    grouped = attention_scores(query.expand(1, 4, 1, 2), key.expand(1, 2, 2, 2), 1.0)
    assert grouped.shape == (1, 4, 1, 2)


@pytest.mark.parametrize("architecture", [*WITH_SCORES, "modernbert"])
def test_vectors_are_those_that_scores_and_outputs_are_made_of(architecture: str) -> None:
    model = tiny_model(architecture)
    stacks = ModelShape.of(model).stacks
    layers = [(name, layer) for name in stacks for layer in range(1, stacks[name].num_layers + 1)]
    spec = SignalSpec(
        attention_scores=frozenset(AttentionScores(*layer) for layer in layers),
        attention_vectors=frozenset(AttentionVectors(*layer, kind) for layer in layers for kind in VECTOR_KINDS),
    )
    batch = tiny_batch(model)
    with torch.no_grad():
        plain = model(**batch).logits
        capture = Capture(model, spec, only_in_training=False)
        outputs = model(**batch)
    assert torch.equal(outputs["logits"], plain)
    signals = capture.signals(outputs)
    for stack, layer in layers:
        queries, keys, values = (signals.attention_vectors[AttentionVectors(stack, layer, kind)] for kind in VECTOR_KINDS)
        for kind, vectors in zip(VECTOR_KINDS, (queries, keys, values), strict=True):
            assert (vectors.shape[1], vectors.shape[3]) == stacks[stack].vectors(kind)
        scores = signals.attention_scores[AttentionScores(stack, layer)]
        made = attention_scores(queries, keys, 1.0)
        if architecture == "t5":
            biases = scores - made
            assert torch.allclose(biases, biases[:1].expand_as(biases), atol=1e-5) and biases.abs().max() > 0.01
            scores = made
        assert torch.allclose(made * (scores.sum() / made.sum()), scores, atol=1e-4)
        assert keys.shape == values.shape and not torch.equal(keys, values)


def test_a_berts_values_are_those_of_its_value_layer() -> None:
    model = tiny_model("bert")
    seen: list[torch.Tensor] = []
    model.bert.encoder.layer[1].attention.self.value.register_forward_hook(lambda module, args, output: seen.append(output))
    key = AttentionVectors("layers", 2, "values")
    capture = Capture(model, SignalSpec(attention_vectors=frozenset({key})), only_in_training=False)
    outputs = model(**tiny_batch(model))
    assert torch.equal(capture.signals(outputs).attention_vectors[key].transpose(1, 2).flatten(2), seen[0])
    assert not [name for name in outputs if name.startswith("attention_scores")]


def test_evaluation_shows_nothing_and_training_does() -> None:
    model = tiny_model("bert")
    capture = Capture(model, all_states(model))
    assert set(model(**tiny_batch(model))) == {"logits"}
    model.train()
    assert len(capture.signals(model(**tiny_batch(model))).hidden_states) == 5


@pytest.mark.parametrize("checkpointing", [False, True])
def test_gradients_flow_through_states_scores_and_vectors(checkpointing: bool) -> None:
    model = tiny_model("bert").train()
    if checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    spec = SignalSpec(
        hidden_states=frozenset({HiddenState("layers", 2)}),
        attention_scores=frozenset({AttentionScores("layers", 3)}),
        attention_vectors=frozenset({AttentionVectors("layers", 3, "queries"), AttentionVectors("layers", 4, "values")}),
    )
    capture = Capture(model, spec)
    signals = capture.signals(model(**tiny_batch(model)))
    shown = [signals.hidden_states[HiddenState("layers", 2)], signals.attention_scores[AttentionScores("layers", 3)]]
    shown += signals.attention_vectors.values()
    sum(tensor.pow(2).sum() for tensor in shown).backward()
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    assert gradients["bert.encoder.layer.0.output.dense.weight"].abs().sum() > 0.01
    assert gradients["bert.encoder.layer.2.attention.self.query.weight"].abs().sum() > 0.01
    assert gradients["bert.encoder.layer.3.attention.self.value.weight"].abs().sum() > 0.01
    assert gradients["bert.encoder.layer.3.attention.self.query.weight"] is None
    assert gradients["bert.encoder.layer.3.output.dense.weight"] is None
    if checkpointing:
        again = tiny_model("bert").train()
        signals = Capture(again, spec).signals(again(**tiny_batch(again)))
        shown = [*signals.hidden_states.values(), *signals.attention_scores.values(), *signals.attention_vectors.values()]
        sum(tensor.pow(2).sum() for tensor in shown).backward()
        for name, parameter in again.named_parameters():
            if parameter.grad is not None:
                assert torch.allclose(parameter.grad, gradients[name], rtol=1e-4, atol=1e-5), name


def test_listening_is_not_saved(tmp_path: object) -> None:
    model = tiny_model("bert")
    Capture(model, SignalSpec(attention_scores=frozenset({AttentionScores("layers", 1)})))
    model.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path)
    assert again.config._attn_implementation == "sdpa"
    assert "scores" not in (tmp_path / "config.json").read_text()  # type: ignore[operator]


def test_projections_are_applied_in_one_order_whatever_the_order_of_the_set() -> None:
    # Under ZeRO-3 every process gathers a projection when it is applied; a set of names has another order in each process.
    model = tiny_model("bert", num_layers=2).train()
    names = [f"map_{letter}" for letter in "gbfadce"]
    applied: list[str] = []

    def project(name: str, state: torch.Tensor) -> torch.Tensor:
        applied.append(name)
        return state

    Capture(model, SignalSpec(hidden_states=frozenset(HiddenState("layers", 1, name) for name in names)), project=project)
    model(**tiny_batch(model))
    assert applied == sorted(names)
