"""One layer of a narrow student, fitted to the teacher's layers that it stands for.

query, key     of each head: the directions that say most about the scores over the sample, q_S . k_S / sqrt(d_S) = q_T . k_T / sqrt(d_T)
value, output  of each head: the directions in which it writes most into the subspace
neurons        those of all layers that the student's layer stands for that write most into the subspace
output layers  and their LayerNorms: least squares on what the student's own heads and neurons give
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from hf_compress.students.encoder_parts import EncoderParts, linear
from hf_compress.students.least_squares import Ridge, fit_residual
from hf_compress.students.pca_basis import PcaBasis
from hf_compress.students.replay import Calls, Sample, Side, replay
from hf_compress.students.warm_parts import EncoderNorms

# Of a head's largest variance: directions below are noise, and are not divided by.
_FLOOR = 1e-6


@dataclass(frozen=True)
class TeacherLayer:
    """A layer of the teacher and the hidden states that came into it, (batch, time, width) for each batch."""

    module: nn.Module
    states: Sequence[Tensor]


def fit_layer(
    student: nn.Module,
    own_calls: Calls,
    own: Sequence[Tensor],
    covered: Sequence[TeacherLayer],
    calls: Calls,
    target: Tensor,
    basis: PcaBasis,
    sample: Sample,
    parts: EncoderParts,
    norms: EncoderNorms,
) -> None:
    """Fit a student's layer, map after map.

    Args:
        student: the layer; its weights are replaced.
        own_calls: how the student calls its layers.
        own: the student's states that come into it, one a batch.
        covered: the teacher's layers that it stands for; attention is that of the last.
        calls: how the teacher calls its layers.
        target: (tokens, teacher's width), what the last of them gives.
        basis: the student's subspace.
        sample: which positions hold tokens, and which of them are fitted on.
        parts: where layers keep what.
        norms: where they keep their LayerNorms.
    """
    last = covered[-1]
    watch: dict[str, tuple[str, Side]] = {
        "query": (parts.query, "out"),
        "key": (parts.key, "out"),
        "value": (parts.value, "out"),
        "attention_norm_in": (norms.attention, "in"),
        "attention_norm_out": (norms.attention, "out"),
        "feed_forward_norm_in": (norms.feed_forward, "in"),
    }
    watch |= {"neurons_in": (parts.feed_forward_input, "out"), "neurons_out": (parts.feed_forward_output, "in")}
    _, shown = replay(last.module, calls, last.states, sample, watch)
    fitted = sample.fitted

    incoming = sample.flat(own)
    ridge = Ridge(incoming, fitted)
    attention_norm = norm_in(last.module, norms.attention)
    writes = basis.directions((linear(last.module, parts.attention_output).weight.float() * attention_norm.weight.float()[:, None]).T)
    heads = int(getattr(last.module.get_submodule(parts.attention), parts.heads))
    wanted = _narrow_heads(shown, writes, fitted, heads, linear(student, parts.query).out_features // heads)
    for path, name in ((parts.query, "query"), (parts.key, "key"), (parts.value, "value")):
        ridge.fit(wanted[name]).put_into(linear(student, path))

    _, ours = replay(student, own_calls, own, sample, {"context": (parts.attention_output, "in")})
    start = narrowed_input(basis, attention_norm, shown["attention_norm_in"])
    middle = basis.narrowed(shown["attention_norm_out"])
    fit = fit_residual(Ridge(ours["context"], fitted), norm_in(student, norms.attention), incoming, start, middle, fitted)
    fit.put_into(linear(student, parts.attention_output))

    _, ours = replay(student, own_calls, own, sample, {"middle": (norms.attention, "out")})
    first = linear(student, parts.feed_forward_input)
    neurons = _neurons(covered, shown, calls, basis, sample, parts, norms, first.out_features)
    Ridge(ours["middle"], fitted).fit(neurons).put_into(first, slice(0, neurons.shape[1]))

    _, activations = replay(student, own_calls, own, sample, {"activations": (parts.feed_forward_output, "in")})
    start = narrowed_input(basis, norm_in(last.module, norms.feed_forward), shown["feed_forward_norm_in"])
    ridge = Ridge(activations["activations"], fitted)
    fit = fit_residual(ridge, norm_in(student, norms.feed_forward), ours["middle"], start, basis.narrowed(target), fitted)
    fit.put_into(linear(student, parts.feed_forward_output))


def narrowed_input(basis: PcaBasis, norm: nn.LayerNorm, inputs: Tensor) -> Tensor:
    """What the student's LayerNorm may read where the teacher's reads `inputs`: its gain is folded in, (tokens, student's width)."""
    return basis.directions(norm.weight.float() * (inputs - inputs.mean(-1, keepdim=True)))


def norm_in(layer: nn.Module, path: str) -> nn.LayerNorm:
    """A LayerNorm inside a layer or an encoder."""
    found = layer.get_submodule(path)
    assert isinstance(found, nn.LayerNorm)
    return found


def _narrow_heads(shown: dict[str, Tensor], writes: Tensor, fitted: Tensor, heads: int, size: int) -> dict[str, Tensor]:
    """What the narrow heads should compute, (tokens, heads * size) each.

    Args:
        shown: the teacher's query, key and value, (tokens, heads * its size).
        writes: (heads * its size, student's width), what a value writes into the subspace.
        fitted: (tokens,) bool.
        heads: how many.
        size: of a narrow head.
    """
    their_size = shown["query"].shape[-1] // heads
    # Scores are divided by the root of the head's size, which is another now; half of the factor goes to either side.
    scale = (size / their_size) ** 0.25
    queries, keys, values = [], [], []
    for head in range(heads):
        rows = slice(head * their_size, (head + 1) * their_size)
        # What is common to all keys moves all scores of a row alike; softmax does not see it, so it takes up no direction.
        query, key, value = shown["query"][:, rows], _centred(shown["key"][:, rows], fitted), shown["value"][:, rows]
        (query_root, query_inverse), (key_root, key_inverse) = (_roots(each[fitted]) for each in (query, key))
        left, strength, right = torch.linalg.svd(query_root @ key_root)
        root = strength[:size].sqrt() * scale
        queries.append(query @ (query_inverse @ left[:, :size] * root))
        # `AttentionScoresLoss` does see it: a constant in the narrow keys stands for it as well as one can.
        narrow = queries[-1][fitted].double()
        common = (query @ shown["key"][fitted][:, rows].mean(0))[fitted].double() * scale**2
        constant = torch.linalg.pinv(narrow.T @ narrow, hermitian=True) @ (narrow.T @ common)
        keys.append(key @ (key_inverse @ right[:size].T * root) + constant.to(key.dtype))
        value_root, _ = _roots(_centred(value, fitted)[fitted])
        _, _, directions = torch.linalg.svd(value_root @ writes[rows], full_matrices=False)
        values.append(value @ (writes[rows] @ directions[:size].T))
    return {"query": torch.cat(queries, 1), "key": torch.cat(keys, 1), "value": torch.cat(values, 1)}


def _roots(states: Tensor) -> tuple[Tensor, Tensor]:
    """The square root of the second moments (size, size) and its inverse, in which weak directions are held up."""
    moments = (states.T @ states).double() / len(states)
    values, vectors = torch.linalg.eigh(moments)
    roots = values.clamp_min(float(values[-1]) * _FLOOR + 1e-30).sqrt()
    return (vectors * roots @ vectors.T).to(states.dtype), (vectors / roots @ vectors.T).to(states.dtype)


def _centred(states: Tensor, fitted: Tensor) -> Tensor:
    return states - states[fitted].mean(0)


def _neurons(
    covered: Sequence[TeacherLayer],
    last: Mapping[str, Tensor],
    calls: Calls,
    basis: PcaBasis,
    sample: Sample,
    parts: EncoderParts,
    norms: EncoderNorms,
    number: int,
) -> Tensor:
    """The inputs (tokens, at most `number`) of the activation function, of the neurons that write most into the subspace."""
    inputs, scores = [], []
    for layer in covered:
        watch: dict[str, tuple[str, Side]] = {
            "neurons_in": (parts.feed_forward_input, "out"),
            "neurons_out": (parts.feed_forward_output, "in"),
        }
        shown = last if layer is covered[-1] else replay(layer.module, calls, layer.states, sample, watch)[1]
        gain = norm_in(layer.module, norms.feed_forward).weight.float()
        writes = basis.directions((linear(layer.module, parts.feed_forward_output).weight.float() * gain[:, None]).T)
        scores.append(shown["neurons_out"][sample.fitted].var(0) * writes.square().sum(1))
        inputs.append(shown["neurons_in"])
    kept = torch.cat(scores).argsort(descending=True, stable=True)[:number].sort().values
    return torch.cat(inputs, 1)[:, kept]
