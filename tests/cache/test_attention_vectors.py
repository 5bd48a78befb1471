"""Queries, keys and values on disk: stored whole beside whatever is kept of hidden states, and read as attention got them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from hf_compress.cache.codec_name import CodecName
from hf_compress.cache.copy_view import View, copy_view
from hf_compress.cache.estimate import TeacherSizes, estimate
from hf_compress.cache.manifest import Manifest
from hf_compress.cache.reader import TeacherCache
from hf_compress.cache.selection import Selection
from hf_compress.cache.verify import verify
from hf_compress.errors import CacheError
from hf_compress.signals import VECTOR_KINDS, AttentionVectors, SignalSpec, VectorKind
from hf_compress.task import ModelShape
from hf_compress.teacher_identity import shape_of, stack_sizes
from tests.cache.tiny_caches import COLUMNS, Collator, Example, built, canonical, padded, pairs, scores, states
from tests.tiny_models import tiny_model

CODECS: tuple[CodecName, ...] = ("float32", "float16", "bfloat16", "int8")
COLLATORS: dict[str, Collator] = {"right": padded(), "left": padded("left"), "more": padded(more=9)}
NOISE = 2e-5


def vectors(layer: int, *kinds: VectorKind) -> SignalSpec:
    return SignalSpec(attention_vectors=frozenset(AttentionVectors("layers", layer, kind) for kind in kinds or VECTOR_KINDS))


def teacher(**config: Any) -> Any:
    return tiny_model("bert", num_layers=4, seed=1, **config)


def of_bert(model: Any, example: Example, layer: int, kind: VectorKind) -> Tensor:
    """(heads, tokens, head width) of one unpadded example, from the layer that computes them."""
    seen: list[Tensor] = []
    part = getattr(model.bert.encoder.layer[layer - 1].attention.self, {"queries": "query", "keys": "key", "values": "value"}[kind])
    hook = part.register_forward_hook(lambda module, args, output: seen.append(output[0]))
    with torch.no_grad():
        model(**{name: torch.tensor([values]) for name, values in example.items()})
    hook.remove()
    return seen[0].unflatten(-1, (model.config.num_attention_heads, -1)).transpose(0, 1)


def agrees(cache: TeacherCache, model: Any, data: list[Example], collator: Collator, codec: CodecName) -> None:
    known = canonical(data, collator)
    found = cache.read(known, vectors(2) | vectors(4, "values")).attention_vectors
    assert len(found) == 4
    steps = {"float32": 0.0, "float16": 2**-11, "bfloat16": 2**-8, "int8": 0.0}
    for key, stored in found.items():
        for row, example in enumerate(data):
            start, length = int(known.starts[row]), len(example["input_ids"])
            expected = of_bert(model, example, key.layer, key.kind)
            here = stored[row, :, start : start + length].float()
            # int8 has one scale for all heads of a token.
            bound = expected.abs().amax((0, 2), keepdim=True) / 254 if codec == "int8" else expected.abs() * steps[codec]
            assert bool(((here - expected).abs() <= bound * 1.001 + NOISE).all()), key
            assert stored[row, :, :start].abs().sum() == 0 and stored[row, :, start + length :].abs().sum() == 0


@pytest.mark.parametrize("words", ["all", "4t_0.4h"])
@pytest.mark.parametrize("codec", CODECS)
def test_vectors_come_back_in_batches_of_any_padding(tmp_path: Path, codec: CodecName, words: str) -> None:
    model, data = teacher(), pairs()
    spec = SignalSpec(logits=True) | states(4) | scores(1) | vectors(2) | vectors(4, "values")
    cache = built(tmp_path, model, data, spec, Selection.parse(words, length=None if words == "all" else "left_first"), codec)
    assert cache.spec == spec
    for batch, collator in ((data, "right"), (data[2:7], "left"), (data[::-1], "more")):
        agrees(cache, model, batch, COLLATORS[collator], codec)
    if codec == "float16":
        moved = cache.read(canonical(data), vectors(2, "keys")).attention_vectors[AttentionVectors("layers", 2, "keys")]
        assert moved.dtype == torch.float16
    assert verify(tmp_path).problems == ()


def test_a_view_takes_them_along_or_writes_them_smaller(tmp_path: Path) -> None:
    model, data = teacher(), pairs()
    built(tmp_path / "whole", model, data, states(2, 4) | vectors(2) | vectors(4, "values"))
    for codec in ("float32", "int8"):
        view = View(Selection.parse("1l_3t", length="left_first"), "test", codec)  # type: ignore[arg-type]
        copy_view(tmp_path / "whole", tmp_path / codec, view)
        agrees(TeacherCache(tmp_path / codec), model, data, padded("left"), codec)  # type: ignore[arg-type]
    copy_view(tmp_path / "whole", tmp_path / "none", replace(view, attention_scores=False))
    assert TeacherCache(tmp_path / "none").spec == states(4)
    with pytest.raises(CacheError, match=r"ask for attention_vectors.layers.2.keys, .*holds hidden_states.layers.4\."):
        TeacherCache(tmp_path / "none").refuse_absent(vectors(2, "keys") | states(4))


@pytest.mark.parametrize("architecture", ["bert", "llama"])
def test_their_sizes_are_known_before_and_after(tmp_path: Path, architecture: str) -> None:
    """Llama's keys and values have fewer heads than its queries."""
    model, data = tiny_model(architecture, num_layers=4, seed=1), pairs()
    live = ModelShape.of(model)
    spec = vectors(3) | states(3)
    cache = built(tmp_path, model, data, spec)
    sizes = TeacherSizes(stack_sizes(live), {}, ranks=True)
    expected = sum(estimate(spec, Selection.everything(), "float32", sizes, len(example["input_ids"])).each for example in data)
    headers = cache.manifest.bytes - expected
    assert 0 < headers < 4096
    again = TeacherSizes.of(Manifest.load(tmp_path), cache.stored.selection)
    assert dict(again.stacks["layers"].vectors) == dict(sizes.stacks["layers"].vectors)
    stored = shape_of(cache.manifest, cache.selection)
    assert [stored.stacks["layers"].vectors(kind) for kind in VECTOR_KINDS] == [
        live.stacks["layers"].vectors(kind) for kind in VECTOR_KINDS
    ]
    assert stored.shows_attention_vectors and not stored.shows_attention_scores
    assert set(cache.manifest.input_columns) <= COLUMNS
