"""An estimate is what a cache takes, to the byte."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from safetensors.numpy import load_file

from hf_compress.cache.estimate import TeacherSizes, estimate
from hf_compress.cache.index import Index
from hf_compress.cache.manifest import INDEX_FILE, SHARED_FILE, Manifest
from hf_compress.cache.selection import Selection
from hf_compress.cache.stack_sizes import StackSizes
from hf_compress.cache.tensor_file import TensorFile
from hf_compress.errors import ArgumentError, TeacherError
from hf_compress.signals import SignalSpec
from tests.cache.tiny_caches import builder, pairs, scores, states
from tests.tiny_models import tiny_model

SIZES = TeacherSizes({"layers": StackSizes(16, 2)}, {"logits": (2,)}, ranks=True)
BERT = TeacherSizes({"layers": StackSizes(768, 12)}, {"logits": (2,)}, ranks=True)
LENGTH = 9


def held(folder: Path) -> int:
    """The bytes of all tensors: without headers, and without the one offset more than there are records."""
    total = 0
    manifest = Manifest.load(folder)
    for info in manifest.shards:
        file = TensorFile(folder / info.name)
        for name, tensor in file.tensors.items():
            total += tensor.end - tensor.begin - (4 if name.startswith("rows.") else 0)
    index = Index.open(folder / INDEX_FILE, manifest.examples)
    total += index.keys.nbytes + index.places.nbytes
    shared = folder / SHARED_FILE
    return total + (sum(tensor.nbytes for tensor in load_file(shared).values()) if shared.exists() else 0)


@pytest.mark.parametrize("codec", ["float32", "bfloat16", "int8"])
@pytest.mark.parametrize(
    ("text", "more"),
    [
        ("all", {}),
        ("1l_3t", {"length": "left_first"}),
        ("1l_3t_0.4h", {}),
        ("1l_3t_0.4h", {"width_scheme": "random"}),
        ("1l_3t_0.4h", {"width_scheme": "magnitude"}),
        ("0.4h", {"width_scheme": "uniform"}),
    ],
)
def test_it_is_what_a_build_writes(tmp_path: Path, text: str, more: dict[str, Any], codec: Any) -> None:
    spec = SignalSpec(logits=True) | states(2, 4) | (scores(3) if text == "all" else SignalSpec())
    selection = Selection.parse(text, **more)
    data = [example for example in pairs(200) if len(example["input_ids"]) == LENGTH]
    building = builder(tmp_path, tiny_model("bert", num_layers=4), data, spec, selection, codec)
    examples = building.build().examples
    building.run.source.close()
    assert estimate(spec, selection, codec, SIZES, LENGTH).total(examples) == held(tmp_path)


@pytest.mark.parametrize(
    ("width", "codec", "size"),
    [("pca", "float16", 1600), ("pca", "int8", 880), ("magnitude", "float16", 2580), ("magnitude", "int8", 1852)],
)
def test_the_table_in_the_readme(width: Any, codec: Any, size: int) -> None:
    found = estimate(SignalSpec(logits=True) | states(10), Selection.parse("1l_10t_0.1h", width_scheme=width), codec, BERT, 53)
    assert found.each == size
    assert found.shared == (4 * 768 * 77 if width == "pca" else 0)


def test_logits_alone() -> None:
    found = estimate(SignalSpec(logits=True), Selection.everything(), "float32", BERT, 128)
    assert (found.each, found.shared, found.total(10)) == (8 + 48, 0, 560)


def test_what_cannot_be() -> None:
    blind = TeacherSizes(BERT.stacks, BERT.logits, ranks=False)
    with pytest.raises(TeacherError, match="left_first"):
        estimate(states(10), Selection.parse("1l_10t"), "float16", blind, 10)
    assert estimate(states(10), Selection.parse("1l_10t", length="left_first"), "float16", blind, 10).each > 15360
    with pytest.raises(ArgumentError, match="1 at least"):
        estimate(states(10), Selection.everything(), "float16", BERT, 0)
