"""The manifest: what a cache is, of which teacher, and which files it has. It is written last, so a folder without one is not finished.

It holds a checksum of itself, and is read only if it is written byte for byte as `save` writes it: a flipped byte anywhere is found.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, is_dataclass
from datetime import datetime
from pathlib import Path
from typing import Any, cast

import xxhash

from hf_compress.cache.files import read_file, write_atomic
from hf_compress.cache.index import longer_index_name
from hf_compress.cache.shard import ONE_ROW, Column, ShardInfo, check_columns, is_shard_name
from hf_compress.cache.strict_json import Fields, canonical, difference, parse, shown
from hf_compress.errors import CacheError

FORMAT_VERSION = 1
MANIFEST_FILE, INDEX_FILE, SHARED_FILE = "manifest.json", "index.safetensors", "shared.safetensors"
_LARGEST = 1 << 28


@dataclass(frozen=True)
class TeacherIdentity:
    """Which teacher was asked.

    Attributes:
        name: as it was given: a path, or a name on the hub.
        model_class: such as "BertForSequenceClassification".
        weights: a hash of its weights.
        dtype: what it computed in.
        stacks: by stack, `num_layers`, `hidden_size` and `num_attention_heads`.
        labels: their names, in order.
        vocab_size: of its embedding.
        scores: its own, by metric.
    """

    name: str
    model_class: str
    weights: str
    dtype: str
    stacks: dict[str, dict[str, int]]
    labels: tuple[str, ...]
    vocab_size: int
    scores: dict[str, float]


@dataclass(frozen=True)
class Manifest:
    """What a cache is.

    Attributes:
        format_version: of the files, see README.md.
        created: when, ISO 8601.
        hf_compress_version: of the package that built it.
        teacher: whose knowledge it is.
        tokenizer: a hash of the tokenizer; "" where it is not known.
        input_columns: what the teacher reads, and an example's key is made of.
        selection: what was chosen of the hidden states; any JSON.
        distillation: what it was built for: recipe, layer map; any JSON.
        columns: what every shard holds.
        shared: xxh3_128 of `shared.safetensors`, None if there is none.
        index: xxh3_128 of the file `index_file`.
        shards: in the order that the index counts them in.
        examples: that the index knows; shards may hold more records where an example was stored twice.
        tokens: of all examples together.
        bytes: of all files but the manifest.
        appended: how many of the last shards were appended when it was finished already. The file has this field only if there are some.
    """

    format_version: int
    created: str
    hf_compress_version: str
    teacher: TeacherIdentity
    tokenizer: str
    input_columns: tuple[str, ...]
    selection: dict[str, Any]
    distillation: dict[str, Any]
    columns: tuple[Column, ...]
    shared: str | None
    index: str
    shards: tuple[ShardInfo, ...]
    examples: int
    tokens: int
    bytes: int
    appended: int = 0

    def __post_init__(self) -> None:
        # JSON has no tuples: what is loaded is to be equal to what was saved.
        object.__setattr__(self, "selection", _plain(self.selection))
        object.__setattr__(self, "distillation", _plain(self.distillation))

    @property
    def index_file(self) -> str:
        """The index's name. Appending writes another one, so that the cache is whole at any moment, as it was or as it will be."""
        return longer_index_name(len(self.shards)) if self.appended else INDEX_FILE

    def continues(self, earlier: Manifest) -> bool:
        """Whether this is a cache's manifest after appends, or none, to the cache that had the earlier one."""
        same = (self.columns, self.selection, self.teacher) == (earlier.columns, earlier.selection, earlier.teacher)
        return same and self.shards[: len(earlier.shards)] == earlier.shards

    def save(self, folder: Path) -> None:
        """Write it, at once and as a whole; all other files of the cache are there before.

        Raises:
            CacheError: if it could not be read back just so, or there is no room.
        """
        text = _serialised(asdict(self))
        if differs := difference(asdict(_read(text, "The manifest")), asdict(self)):
            raise CacheError(f"The manifest cannot be written: read back, it would differ: {differs}.")
        write_atomic(folder / MANIFEST_FILE, text)

    @classmethod
    def load(cls, folder: Path) -> Manifest:
        """Read it, checking every field.

        Raises:
            CacheError: if there is none, it is damaged, or of a version that this package does not read.
        """
        path = folder / MANIFEST_FILE
        if not path.exists() and not path.is_symlink():
            raise CacheError(
                f"{folder} has no {MANIFEST_FILE}: it is no cache, or one whose building was stopped. "
                "Build it; what is there already is kept."
            )
        return _read(read_file(path, _LARGEST), str(path))


def refuse_mismatch(found: Manifest, expected: Mapping[str, object], command: str) -> None:
    """Refuse a cache that is not what a run needs.

    Args:
        found: the manifest.
        expected: by field, what it should be, "teacher.weights" being a field of a field; fields that are not named may be anything.
            Dataclasses count as dictionaries, tuples as lists.
        command: what rebuilds the cache as it should be.

    Raises:
        CacheError: naming the first field that differs, both values, and the command.
    """
    whole = asdict(found)
    for name, value in expected.items():
        here: object = whole
        for part in name.split("."):
            if not isinstance(here, dict) or part not in here:
                raise CacheError(f"A manifest has no field {name!r}; it has {', '.join(whole)}.")
            here = here[part]
        if differs := difference(here, _plain(value), name):
            raise CacheError(f"The teacher on disk is not the one that this run needs: {differs}. Build it anew: {command}")


def _plain(value: object) -> object:
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, Mapping):
        return {name: _plain(item) for name, item in value.items()}
    return _plain(asdict(cast(Any, value))) if is_dataclass(value) else value


def _serialised(content: Mapping[str, object]) -> bytes:
    body = {name: value for name, value in content.items() if name != "checksum" and (name, value) != ("appended", 0)}
    checksum = xxhash.xxh3_128_hexdigest(canonical(body))
    return json.dumps({**body, "checksum": checksum}, indent=1).encode("ascii") + b"\n"


def _read(text: bytes, where: str) -> Manifest:
    content = parse(text, where)
    version = Fields(content, where).value("format_version")
    if version != FORMAT_VERSION or type(version) is not int:
        raise CacheError(
            f"{where}: format_version is {shown(version)}; expected {FORMAT_VERSION}. It was written by another version of hf_compress: "
            "use that one, or build the cache again."
        )
    assert isinstance(content, dict)  # Fields refuses all else
    names = [field.name for field in fields(Manifest) if field.name != "appended" or "appended" in content]
    top = Fields(content, where, [*names, "checksum"])
    if (written := _serialised(content)) != text:
        found, expected = top.value("checksum"), json.loads(written)["checksum"]
        how = f"checksum is {shown(found)}; expected {expected!r}" if found != expected else "it is not laid out as hf_compress does it"
        raise CacheError(f"{where} is damaged, or was edited: {how}. Copy it again, or build the cache again.")
    manifest = Manifest(
        format_version=FORMAT_VERSION,
        created=top.text("created", _is_time, "a time, such as 2026-01-31T12:00:00+00:00"),
        hf_compress_version=top.text("hf_compress_version"),
        teacher=_teacher(top.inner("teacher", [field.name for field in fields(TeacherIdentity)])),
        tokenizer=top.text("tokenizer", lambda text: True, "text"),
        input_columns=top.texts("input_columns"),
        selection=top.free("selection"),
        distillation=top.free("distillation"),
        columns=tuple(top.items("columns", _column)),
        shared=None if top.value("shared") is None else top.text("shared", _is_hash, "32 hex digits, or null"),
        index=top.text("index", _is_hash, "32 hex digits"),
        shards=tuple(top.items("shards", _shard)),
        examples=top.count("examples", 1),
        tokens=top.count("tokens"),
        bytes=top.count("bytes"),
        appended=top.count("appended", 1) if "appended" in content else 0,
    )
    _check_together(manifest, where)
    return manifest


def _teacher(found: Fields) -> TeacherIdentity:
    stacks = found.inner("stacks")
    return TeacherIdentity(
        name=found.text("name"),
        model_class=found.text("model_class"),
        weights=found.text("weights"),
        dtype=found.text("dtype"),
        stacks={name: stacks.counts(name) for name in stacks.names},
        labels=found.texts("labels"),
        vocab_size=found.count("vocab_size"),
        scores=found.numbers("scores"),
    )


def _column(value: object, where: str) -> Column:
    found = Fields(value, where, [field.name for field in fields(Column)])
    name, group = found.text("name"), found.text("group", lambda text: True, "text")
    item = tuple(found.items("item", lambda size, inner: Fields({"": size}, inner).count("")))
    try:
        return Column(name, group, found.text("dtype"), item)
    except CacheError as error:
        raise CacheError(f"{where}: {error}") from error


def _shard(value: object, where: str) -> ShardInfo:
    found = Fields(value, where, [field.name for field in fields(ShardInfo)])
    return ShardInfo(
        name=found.text("name", is_shard_name, "a name such as shard-00000.safetensors"),
        examples=found.count("examples", 1, 2**32 - 1),
        rows=found.counts("rows"),
        bytes=found.count("bytes", 1),
        hash=found.text("hash", _is_hash, "32 hex digits"),
        seal=found.text("seal", _is_hash, "32 hex digits"),
    )


def _check_together(manifest: Manifest, where: str) -> None:
    try:
        check_columns(manifest.columns)
    except CacheError as error:
        raise CacheError(f"{where}: columns: {error}") from error
    names = [shard.name for shard in manifest.shards]
    if len(set(names)) != len(names):
        raise CacheError(f"{where}: shards: a name stands there twice; expected each shard once.")
    groups = {column.group for column in manifest.columns} - {ONE_ROW}
    for shard in manifest.shards:
        if missing := sorted(groups - set(shard.rows)):
            raise CacheError(f"{where}: {shard.name}: rows of the groups {shown(missing)} are missing; found {shown(sorted(shard.rows))}.")
    if manifest.appended >= len(manifest.shards) > 0:
        raise CacheError(f"{where}: appended is {manifest.appended}; expected fewer than the {len(manifest.shards)} shards.")
    if manifest.examples > (records := sum(shard.examples for shard in manifest.shards)):
        raise CacheError(f"{where}: examples is {manifest.examples}; expected at most {records}, which is what the shards have.")


def _is_time(text: str) -> bool:
    try:
        datetime.fromisoformat(text)
    except ValueError:
        return False
    return True


def _is_hash(text: str) -> bool:
    return len(text) == 32 and set(text) <= set("0123456789abcdef")
