"""The manifest: what is saved is loaded, and nothing else is."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import xxhash

from hf_compress.cache.manifest import MANIFEST_FILE, Manifest, refuse_mismatch
from hf_compress.cache.strict_json import canonical, difference
from hf_compress.errors import CacheError
from tests.cache.small_cache import TEACHER, SmallCache, build


@pytest.fixture
def cache(tmp_path: Path) -> SmallCache:
    return build(tmp_path / "cache")


def put(folder: Path, content: dict[str, Any]) -> None:
    """Write a manifest as `save` would write it if it let it pass: with its checksum right."""
    body = {name: value for name, value in content.items() if name != "checksum"}
    text = json.dumps({**body, "checksum": xxhash.xxh3_128_hexdigest(canonical(body))}, indent=1) + "\n"
    (folder / MANIFEST_FILE).write_text(text)


def test_round_trip(cache: SmallCache) -> None:
    assert Manifest.load(cache.folder) == cache.manifest
    before = (cache.folder / MANIFEST_FILE).read_bytes()
    Manifest.load(cache.folder).save(cache.folder)
    assert (cache.folder / MANIFEST_FILE).read_bytes() == before
    content = json.loads(before)
    put(cache.folder, content)
    assert (cache.folder / MANIFEST_FILE).read_bytes() == before
    odd = replace(
        cache.manifest, shared=None, tokenizer="", teacher=replace(TEACHER, name="ü/\ud800", scores={"f1": 1, "loss": -1e-300}, labels=())
    )
    odd.save(cache.folder)
    assert Manifest.load(cache.folder) == odd


FIELDS: list[tuple[str, object, str]] = [
    ("format_version", 2, "format_version is 2; expected 1"),
    ("format_version", "1", "format_version is '1'"),
    ("format_version", True, "format_version is True"),
    ("created", "yesterday", "created is 'yesterday'; expected a time"),
    ("created", 3, "created is 3"),
    ("hf_compress_version", "", "hf_compress_version is ''; expected some text"),
    ("tokenizer", None, "tokenizer is None"),
    ("input_columns", "input_ids", "input_columns is 'input_ids'; expected a list"),
    ("input_columns", [1], r"input_columns\[0\] is 1"),
    ("selection", [], "selection is .*; expected an object"),
    ("distillation", None, "distillation is None"),
    ("shared", "abc", "shared is 'abc'; expected 32 hex digits, or null"),
    ("index", "Z" * 32, "index is 'ZZ"),
    ("appended", 0, "is damaged, or was edited"),
    ("appended", True, "appended is True"),
    ("appended", 2, "appended is 2; expected fewer than the 2 shards"),
    ("examples", -1, "examples is -1; expected a whole number from 1"),
    ("examples", 0, "examples is 0"),
    ("examples", 8.0, "examples is 8.0"),
    ("examples", 1000, "examples is 1000; expected at most 9"),
    ("tokens", None, "tokens is None"),
    ("tokens", False, "tokens is False"),
    ("bytes", 2**63, "bytes is 9223372036854775808"),
    ("shards", {}, "shards is {}; expected a list"),
    ("teacher", "bert", "teacher is 'bert'; expected an object"),
    ("teacher.vocab_size", "30", "teacher: vocab_size is '30'"),
    ("teacher.stacks", {"layers": 4}, "teacher: stacks: layers is 4"),
    ("teacher.stacks", {"layers": {"num_layers": -4}}, "teacher: stacks: layers: num_layers is -4"),
    ("teacher.labels", None, "teacher: labels is None"),
    ("teacher.scores", {"f1": "1"}, "teacher: scores: f1 is '1'; expected a number"),
    ("teacher.scores", {"f1": True}, "f1 is True"),
    ("teacher.more", 1, r"teacher: the fields \['more'\] are not known"),
    ("more", 1, r"the fields \['more'\] are not known"),
    ("columns", [], "columns: .* found none"),
    ("columns.0.dtype", "float8", r"columns\[0\]: There is no dtype 'float8'"),
    ("columns.0.name", "../a", r"columns\[0\]: A column cannot be called '../a'"),
    ("columns.0.name", "logits.values", "logits.values twice"),
    ("columns.0.group", "a/b", r"columns\[0\]: A group cannot be called 'a/b'"),
    ("columns.0.group", "more", r"shard-00000.safetensors: rows of the groups \['more'\] are missing"),
    ("columns.0.item", [-3], r"columns\[0\]: item\[0\] is -3"),
    ("columns.0.item", 3, r"columns\[0\]: item is 3; expected a list"),
    ("shards.0.name", "../shard-00000.safetensors", r"shards\[0\]: name is '../shard-00000"),
    ("shards.0.name", "/etc/passwd", r"shards\[0\]: name is '/etc/passwd'"),
    ("shards.0.name", "shard-00001.safetensors", "a name stands there twice"),
    ("shards.0.examples", -5, r"shards\[0\]: examples is -5"),
    ("shards.0.rows", {"tokens.layers": -1}, "rows: tokens.layers is -1"),
    ("shards.0.bytes", 0, r"shards\[0\]: bytes is 0"),
    ("shards.0.hash", "0", r"shards\[0\]: hash is '0'"),
    ("shards.0.seal", None, r"shards\[0\]: seal is None"),
]


@pytest.mark.parametrize(("name", "value", "message"), FIELDS)
def test_each_field_is_checked(cache: SmallCache, name: str, value: object, message: str) -> None:
    content = json.loads((cache.folder / MANIFEST_FILE).read_text())
    here: Any = content
    *path, last = name.split(".")
    for part in path:
        here = here[int(part) if part.isdigit() else part]
    here[last] = value
    put(cache.folder, content)
    with pytest.raises(CacheError, match=message) as caught:
        Manifest.load(cache.folder)
    assert MANIFEST_FILE in str(caught.value)


def test_each_field_must_be_there(cache: SmallCache) -> None:
    content = json.loads((cache.folder / MANIFEST_FILE).read_text())
    places = [(), ("teacher",), ("columns", 0), ("shards", 1)]
    count = 0
    for place in places:
        here: Any = content
        for part in place:
            here = here[part]
        for name in [name for name in here if name != "checksum"]:
            value = here.pop(name)
            put(cache.folder, content)
            with pytest.raises(CacheError, match=name):
                Manifest.load(cache.folder)
            here[name] = value
            count += 1
    assert count == len(asdict(cache.manifest)) - 1 + 8 + 4 + 6  # `appended` stands there only where something was


@pytest.mark.parametrize("text", [b"", b"{}", b"[]", b"\xff", b"1" * 5000, b"[" * 100_000, b'{"format_version": 1, "format_version": 1}'])
def test_something_else(cache: SmallCache, text: bytes) -> None:
    (cache.folder / MANIFEST_FILE).write_bytes(text)
    with pytest.raises(CacheError, match=MANIFEST_FILE):
        Manifest.load(cache.folder)


def test_edited_by_hand(cache: SmallCache) -> None:
    path = cache.folder / MANIFEST_FILE
    text = path.read_text()
    path.write_text(text.replace('"accuracy": 0.875', '"accuracy": 0.975'))
    with pytest.raises(CacheError, match=r"checksum is '\w{32}'; expected '\w{32}'"):
        Manifest.load(cache.folder)
    path.write_text(text.replace(': "tiny"', ' :"tiny"'))
    with pytest.raises(CacheError, match="not laid out"):
        Manifest.load(cache.folder)


@pytest.mark.parametrize(
    "change",
    [
        {"selection": {1: 2}},
        {"distillation": {"loss": float("nan")}},
        {"distillation": {"a": object()}},
        {"index": "abc"},
        {"format_version": 2},
        {"tokens": -1},
    ],
)
def test_what_could_not_be_read_back_is_not_saved(cache: SmallCache, change: dict[str, Any]) -> None:
    before = (cache.folder / MANIFEST_FILE).read_bytes()
    with pytest.raises(CacheError):
        replace(cache.manifest, **change).save(cache.folder)
    assert (cache.folder / MANIFEST_FILE).read_bytes() == before


def test_tuples_are_lists_from_the_start(cache: SmallCache) -> None:
    manifest = replace(cache.manifest, selection={"pairs": ((1, 2), (3, 4)), "inner": {"more": (5,)}})
    assert manifest.selection == {"pairs": [[1, 2], [3, 4]], "inner": {"more": [5]}}
    manifest.save(cache.folder)
    assert Manifest.load(cache.folder) == manifest


def test_refuse_mismatch(cache: SmallCache) -> None:
    same = {"tokenizer": "cd" * 16, "teacher": TEACHER, "input_columns": ["input_ids", "token_type_ids"], "columns": cache.manifest.columns}
    refuse_mismatch(cache.manifest, same, "build")
    wrong: list[tuple[str, object, str]] = [
        ("tokenizer", "ef" * 16, "tokenizer: found 'cdcd.*', expected 'efef"),
        ("teacher.weights", "x", "teacher.weights: found 'abab.*', expected 'x'"),
        ("teacher", replace(TEACHER, dtype="float16"), "teacher.dtype: found 'float32', expected 'float16'"),
        ("input_columns", ("input_ids",), r"input_columns: found \['input_ids', 'token_type_ids'\], expected \['input_ids'\]"),
        ("distillation.layer_map", [[1, 2], [2, 3]], r"layer_map\[1\]\[1\]: found 4, expected 3"),
        ("selection", {"depth": {"layers": 1}}, "selection.width: found 0.1, expected nothing"),
        ("columns", cache.manifest.columns[1:], "columns: found"),
    ]
    for name, value, message in wrong:
        with pytest.raises(CacheError, match=f"{message}.*hf-compress cache build"):
            refuse_mismatch(cache.manifest, {"created": cache.manifest.created, name: value}, "hf-compress cache build")
    with pytest.raises(CacheError, match=r"no field 'teacher\.wieghts'"):
        refuse_mismatch(cache.manifest, {"teacher.wieghts": "x"}, "build")


def test_difference() -> None:
    assert difference({"a": [1, {"b": None}]}, {"a": (1, {"b": None})}) is None
    assert difference({"a": 1}, {"a": True}) == "a: found 1, expected True"
    assert difference({"a": 1}, {"a": 1.0}) is None
    assert difference({"a": 1, "b": 2}, {"a": 1}) == "b: found 2, expected nothing"
    assert difference({"a": {"b": [1, 2]}}, {"a": {"b": [1, 3]}}) == "a.b[1]: found 2, expected 3"
    assert difference("x" * 1000, "y", "a") is not None and len(difference("x" * 1000, "y", "a") or "") < 150
