"""A smaller cache from a larger one holds what the teacher would have given it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from torch import nn

from hf_compress.cache.build import CPU_BATCH_TOKENS
from hf_compress.cache.copy_view import View, copy_view, layers_of_view
from hf_compress.cache.manifest import SHARED_FILE, Manifest
from hf_compress.cache.reader import TeacherCache
from hf_compress.cache.selection import Depth, Selection
from hf_compress.cache.shard_reader import Shard
from hf_compress.cache.verify import verify
from hf_compress.errors import ArgumentError, CacheError
from hf_compress.signals import SignalSpec
from tests.cache.tiny_caches import builder, canonical, pairs, scores, states
from tests.tiny_models import tiny_model

TOP = SignalSpec(logits=True) | states(4)
WHOLE = SignalSpec(logits=True) | states(0, 2, 4) | scores(2, 4)


@pytest.fixture(scope="module")
def teacher() -> nn.Module:
    return tiny_model("bert", num_layers=4, seed=1)


@pytest.fixture(scope="module")
def whole(teacher: nn.Module, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(tmp_path_factory.mktemp("whole") / "cache", teacher, WHOLE)


def build(folder: Path, teacher: nn.Module, spec: SignalSpec, selection: Selection | None = None, codec: Any = "float32") -> Path:
    """The teacher asked in the batches in which a view is read, so that it rounds alike."""
    building = builder(folder, teacher, pairs(40), spec, selection, codec, batch_tokens=CPU_BATCH_TOKENS)
    building.build()
    building.run.source.close()
    return folder


def view(larger: Path, smaller: Path, selection: Selection, **more: Any) -> Manifest:
    return copy_view(larger, smaller, View(selection, "test", **more))


def files(folder: Path, *names: str) -> dict[str, bytes]:
    """What is in the files of a cache; the manifest, which has a time, is compared by itself."""
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.suffix == ".safetensors" or path.name in names}


def records(folder: Path) -> dict[tuple[int, ...], dict[str, Any]]:
    manifest = Manifest.load(folder)
    found = {}
    for info in manifest.shards:
        shard = Shard.open(folder / info.name, info, manifest.columns)
        for row in range(len(shard)):
            found[tuple(shard.keys[row].tolist())] = shard.record(row)
    return found


def same_but_when(one: Manifest, other: Manifest) -> None:
    for name in (
        "teacher",
        "tokenizer",
        "input_columns",
        "selection",
        "columns",
        "shared",
        "index",
        "shards",
        "examples",
        "tokens",
        "bytes",
    ):
        assert getattr(one, name) == getattr(other, name), name


@pytest.mark.parametrize("codec", ["float32", "float16", "bfloat16", "int8"])
@pytest.mark.parametrize("width", [None, "random", "uniform", "magnitude"])
@pytest.mark.parametrize("length", [None, "left_first", "attention", "attention_no_sep"])
def test_a_view_of_everything_is_what_the_teacher_would_have_given(
    tmp_path: Path, teacher: nn.Module, whole: Path, length: Any, width: Any, codec: Any
) -> None:
    text = "_".join(filter(None, ["1l", "3t" if length else "", "0.4h" if width else ""]))
    selection = Selection.parse(text, length=length, width_scheme=width)
    built = build(tmp_path / "built", teacher, TOP, selection, codec)
    manifest = view(whole, tmp_path / "viewed", selection, codec=codec, attention_scores=False)
    assert files(tmp_path / "viewed") == files(built)
    same_but_when(manifest, Manifest.load(built))
    assert manifest.distillation["selected"] is True
    assert verify(tmp_path / "viewed").problems == ()


def test_a_pca_view_has_the_basis_that_a_build_learns(tmp_path: Path, teacher: nn.Module, whole: Path) -> None:
    selection = Selection.parse("1l_3t_0.4h")
    built = build(tmp_path / "built", teacher, TOP, selection)
    view(whole, tmp_path / "viewed", selection, attention_scores=False)
    ours, theirs = records(tmp_path / "viewed"), records(built)
    assert ours.keys() == theirs.keys()
    for key, record in theirs.items():
        assert ours[key].keys() == record.keys()
        for name, values in record.items():
            np.testing.assert_allclose(ours[key][name], values, rtol=0, atol=1e-5, err_msg=name)
    assert Manifest.load(tmp_path / "viewed").shared is not None


@pytest.mark.parametrize(
    ("larger", "smaller", "width"),
    [
        ("2l_6t_0.5h", "1l_2t_0.5h", "random"),
        ("2l_6t_0.5h", "1l_2t_0.25h", "random"),
        ("2l_6t_0.5h", "1l_2t_0.5h", "uniform"),
        ("2l_6t", "1l_2t_0.25h", "uniform"),
        ("2l_6t", "1l_2t_0.25h", "magnitude"),
        ("2l_6t_0.5h", "1l_6t_0.25h", "magnitude"),
        ("2l_0.5h", "1l_0.5h", "magnitude"),
        ("2l_0.5h", "1l_4t_0.25h", "random"),
    ],
)
def test_a_view_of_a_part(tmp_path: Path, teacher: nn.Module, larger: str, smaller: str, width: Any) -> None:
    held = Selection.parse(larger, width_scheme=width if "h" in larger else None)
    asked = Selection.parse(smaller, width_scheme=width)
    spec = SignalSpec(logits=True) | states(2, 4)
    folder = build(tmp_path / "larger", teacher, spec, held)
    view(folder, tmp_path / "viewed", asked)
    built = build(tmp_path / "built", teacher, TOP, asked)
    assert files(tmp_path / "viewed") == files(built)


def test_a_pca_view_of_pca_takes_the_first_directions(tmp_path: Path, teacher: nn.Module) -> None:
    folder = build(tmp_path / "larger", teacher, TOP, Selection.parse("1l_6t_0.5h"))
    view(folder, tmp_path / "viewed", Selection.parse("1l_2t_0.25h"))
    ours, theirs = records(tmp_path / "viewed"), records(folder)
    name = "hidden_states.layers.4.values"
    for key, record in theirs.items():
        assert ours[key][name].tobytes() == np.ascontiguousarray(record[name][:2, :4]).tobytes()
    assert (tmp_path / "viewed" / SHARED_FILE).stat().st_size < (folder / SHARED_FILE).stat().st_size


def test_a_view_is_read_as_the_larger_cache_would_be(tmp_path: Path, whole: Path) -> None:
    """Reading a selection of the larger cache, and reading the smaller cache: one and the same."""
    selection = Selection.parse("1l_4t_0.5h")
    view(whole, tmp_path / "viewed", selection)
    batch = canonical(pairs(40)[5:12])
    asked = SignalSpec(logits=True) | states(4) | scores(2)
    there, here = (cache.read(batch, asked) for cache in (TeacherCache(whole, selection=selection), TeacherCache(tmp_path / "viewed")))
    (one,), (other,) = there.selected_states.values(), here.selected_states.values()
    assert (one.positions == other.positions).all() and (one.chosen == other.chosen).all()
    np.testing.assert_allclose(one.values[one.chosen], other.values[other.chosen], rtol=0, atol=1e-6)
    np.testing.assert_array_equal(there.logits["logits"], here.logits["logits"])
    for key, scores_there in there.attention_scores.items():
        np.testing.assert_array_equal(scores_there, here.attention_scores[key])


def test_another_codec_alone_keeps_all_signals(tmp_path: Path, teacher: nn.Module, whole: Path) -> None:
    manifest = view(whole, tmp_path / "viewed", Selection.everything(), codec="int8")
    built = build(tmp_path / "built", teacher, WHOLE, None, "int8")
    assert files(tmp_path / "viewed") == files(built)
    assert "selected" not in manifest.distillation
    assert manifest.bytes < 0.5 * Manifest.load(whole).bytes


def test_the_same_view_of_itself_is_the_same_file(tmp_path: Path, whole: Path) -> None:
    view(whole, tmp_path / "viewed", Selection.everything())
    assert files(tmp_path / "viewed") == files(whole)


def test_shards_are_cut_where_a_build_cuts_them(tmp_path: Path, teacher: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hf_compress.cache.plan.SHARD_EXAMPLES", 10)
    monkeypatch.setattr("hf_compress.cache.copy_view.CPU_BATCH_TOKENS", 50)
    selection = Selection.parse("1l_2t", length="left_first")
    for name, kept in (("whole", None), ("built", selection)):
        building = builder(tmp_path / name, teacher, pairs(40), states(4), kept, batch_tokens=50)
        assert len(building.build().shards) > 2
        building.run.source.close()
    heard: list[int] = []
    copy_view(tmp_path / "whole", tmp_path / "viewed", View(selection, "test"), heard.append)
    assert files(tmp_path / "viewed") == files(tmp_path / "built")
    assert sum(heard) == Manifest.load(tmp_path / "built").examples


def test_the_depth_counts_in_the_layers_that_are_stored() -> None:
    def layers(
        asked: Depth, stored: Depth | None = None, held: tuple[int, ...] = (0, 4, 8, 12), own: Any = (), students: Any = None
    ) -> Any:
        return sorted(layers_of_view(asked, stored or Depth(), held, 12, own, students))

    assert layers(Depth()) == [0, 4, 8, 12]
    assert layers(Depth(1)) == [12]
    assert layers(Depth(2)) == [8, 12]
    assert layers(Depth(1), own=((1, 12), (2, 4))) == [4]
    assert layers(Depth(1, "t_top10")) == [10]
    assert layers(Depth(2, "t_top10"), students=4) == [8, 10]
    assert layers(Depth(2, "t_top10"), Depth(3, "t_top10"), (5, 8, 10)) == [8, 10]
    assert layers(Depth(None, "t_top12"), students=3) == [0, 4, 8, 12]
    assert layers(Depth(1, pairs=((1, 6), (2, 9)))) == [9]
    with pytest.raises(ArgumentError, match="give --num_layers"):
        layers(Depth(2, "t_top8"))
    with pytest.raises(ArgumentError, match="write 3l"):
        layers(Depth(4))


@pytest.mark.parametrize(
    ("asked", "words"),
    [
        ({"text": "1l_9t"}, "it holds 6 tokens an example, not 9"),
        ({"text": "1l"}, "it holds 6 tokens an example, not all"),
        ({"text": "1l_2t", "length": "left_first"}, "chosen by attention_no_sep, not left_first"),
        ({"text": "1l_2t", "scheme": "t_top8"}, "does not hold teacher layer 3; it holds 4"),
    ],
)
def test_what_is_not_stored_is_refused_and_leaves_nothing(tmp_path: Path, teacher: nn.Module, asked: dict[str, Any], words: str) -> None:
    folder = build(tmp_path / "larger", teacher, TOP, Selection.parse("1l_6t"))
    with pytest.raises(CacheError, match=words):
        view(folder, tmp_path / "viewed", Selection.parse(**asked))
    assert [path.name for path in tmp_path.iterdir()] == ["larger"]


def test_a_damaged_record_is_not_copied(tmp_path: Path, teacher: nn.Module) -> None:
    folder = build(tmp_path / "larger", teacher, TOP)
    shard = folder / Manifest.load(folder).shards[0].name
    data = bytearray(shard.read_bytes())
    data[-40] ^= 1
    shard.write_bytes(data)
    with pytest.raises(CacheError, match="shard-00000"):
        view(folder, tmp_path / "viewed", Selection.parse("1l_2t"))
    assert [path.name for path in tmp_path.iterdir()] == ["larger"]


def test_a_value_too_large_for_the_codec_leaves_nothing(tmp_path: Path) -> None:
    loud = tiny_model("bert", num_layers=4, seed=1)
    loud.get_submodule("bert.encoder.layer.3.output.LayerNorm").weight.data *= 1e6
    folder = build(tmp_path / "larger", loud, states(4))
    with pytest.raises(CacheError, match="too large for float16"):
        view(folder, tmp_path / "viewed", Selection.parse("1l_2t"), codec="float16")
    assert [path.name for path in tmp_path.iterdir()] == ["larger"]


def test_nothing_is_overwritten(tmp_path: Path, whole: Path) -> None:
    (tmp_path / "viewed").mkdir()
    view(whole, tmp_path / "viewed", Selection.parse("1l_2t"))  # an empty folder will do
    before = files(tmp_path / "viewed", "manifest.json")
    for smaller in (tmp_path / "viewed", whole):
        with pytest.raises(CacheError, match="something in"):
            view(whole, smaller, Selection.parse("1l_2t"))
    assert files(tmp_path / "viewed", "manifest.json") == before


def test_a_cache_of_logits_has_no_states_to_choose_from(tmp_path: Path, teacher: nn.Module) -> None:
    folder = build(tmp_path / "larger", teacher, SignalSpec(logits=True))
    with pytest.raises(CacheError, match="holds no hidden states"):
        view(folder, tmp_path / "viewed", Selection.parse("1l_2t"))
