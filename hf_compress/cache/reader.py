"""A finished cache, open for reading: keys -> records -> signals.

Everything is mapped into memory, nothing is held: what a batch needs is read when it is asked for.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import cast

import numpy as np
import torch

from hf_compress.cache.assemble import Assembler
from hf_compress.cache.codec import CodecName
from hf_compress.cache.fields import field_of, stored_signals
from hf_compress.cache.files import hash_file
from hf_compress.cache.index import Index, split_places
from hf_compress.cache.key import Canonical, Keys
from hf_compress.cache.manifest import INDEX_FILE, SHARED_FILE, Manifest
from hf_compress.cache.selection import Depth, Selection
from hf_compress.cache.shard_reader import Record, Shard
from hf_compress.cache.spaces import SAMPLE_EXAMPLES, make_spaces, needs_sample, read_spaces, sample_size
from hf_compress.errors import CacheError
from hf_compress.selected_state import Space, Subspace
from hf_compress.signals import Signals, SignalSpec

# Each open shard holds a file descriptor, of which a process has 1024 by default.
MOST_OPEN = 256


@dataclass(frozen=True)
class StoredHow:
    """What a manifest says of how hidden states are stored."""

    selection: Selection
    codec: CodecName

    @classmethod
    def of(cls, manifest: Manifest) -> StoredHow:
        """Read it.

        Raises:
            CacheError: if it is malformed.
        """
        entries = dict(manifest.selection)
        codec = entries.pop("codec", None)
        if codec not in ("float32", "float16", "bfloat16", "int8"):
            raise CacheError(f"The manifest's codec is {codec!r}; expected float32, float16, bfloat16 or int8. Build the cache again.")
        return cls(Selection.from_json(entries), cast(CodecName, codec))


def selection_of_view(asked: Selection, stored: Selection) -> Selection:
    """What is asked, its depth counted in the pairs of layers that are stored where it says nothing else."""
    if asked.depth.scheme is not None or asked.depth.pairs is not None:
        return asked
    return replace(asked, depth=Depth(asked.depth.layers or stored.depth.layers, stored.depth.scheme, stored.depth.pairs))


class TeacherCache:
    """A cache, open.

    Args:
        folder: of a finished cache.
        selection: a smaller selection to read it as; None for what it was built with.

    Attributes:
        manifest: what the cache is.
        spec: which signals it can show.
        stored: how hidden states are stored.
        selection: what is read of them.

    Raises:
        CacheError: if it is unfinished, damaged, or cannot be read as `selection`.
    """

    def __init__(self, folder: str | Path, *, selection: Selection | None = None) -> None:
        self.folder = Path(folder)
        self.manifest = Manifest.load(self.folder)
        self.stored = StoredHow.of(self.manifest)
        self.selection = self.stored.selection if selection is None else selection_of_view(selection, self.stored.selection)
        self.columns = {column.name: column for column in self.manifest.columns}
        self.spec = stored_signals(list(self.columns))
        self.index = Index.open(self.folder / INDEX_FILE, self.manifest.examples)
        self._shards: dict[int, Shard] = {}
        self._refuse_no_view()
        self._hidden_sizes = {name: size["hidden_size"] for name, size in self.manifest.teacher.stacks.items()}
        stored_spaces = self._stored_spaces()
        self._assembler = Assembler(
            self.columns,
            self.stored.selection,
            self.selection,
            self.stored.codec,
            stored_spaces,
            self._wanted_spaces(stored_spaces),
            self._hidden_sizes,
        )

    def __len__(self) -> int:
        return self.manifest.examples

    def __getstate__(self) -> dict[str, object]:
        """For workers: maps are opened anew there."""
        return {"folder": self.folder, "selection": self.selection, "label_order": self._assembler.label_order}

    def __setstate__(self, state: dict[str, object]) -> None:
        self.__init__(cast(Path, state["folder"]), selection=cast(Selection, state["selection"]))  # type: ignore[misc]
        self._assembler.label_order = state["label_order"]  # type: ignore[assignment]

    def put_labels_in_order(self, label_order: Sequence[int] | None) -> None:
        """Give logits in the student's order of labels; see `LiveTeacher`."""
        self._assembler.label_order = None if label_order is None else torch.tensor(label_order)

    def missing(self, keys: Keys) -> int:
        """How many of these examples (n, 2) it does not hold."""
        return int((self.index.find(keys) < 0).sum())

    def read(self, batch: Canonical, spec: SignalSpec) -> Signals:
        """What the teacher showed for a batch.

        Args:
            batch: the examples, and where their tokens stand.
            spec: which signals.

        Raises:
            CacheError: if examples are missing, records damaged, or signals not stored.
        """
        self.refuse_absent(spec)
        keys = batch.keys()
        places = self.index.find(keys)
        if (absent := int((places < 0).sum())) > 0:
            raise CacheError(
                f"{absent} of {len(places)} examples of a batch are not in the teacher on disk ({self.folder}, {len(self):,} examples). "
                "Does the "
                "data change from epoch to epoch (masking, augmentation), was it tokenized in another way (tokenizer, --max_seq_length), "
                "or is it other data? Build a cache of this data in another folder (--teacher_cache_dir, --teacher_model_name_or_path)."
            )
        return self._assembler.assemble(self._records(places, keys), batch, spec)

    def close(self) -> None:
        """Let the maps go."""
        self._shards = {}

    def _records(self, places: np.ndarray[tuple[int, ...], np.dtype[np.int64]], keys: Keys) -> list[Record]:
        records: list[Record | None] = [None] * len(places)
        shards, rows = split_places(places)
        for number in np.unique(shards).tolist():
            here = np.flatnonzero(shards == number)
            for place, record in zip(here.tolist(), self._shard(number).records(rows[here], keys=keys[here]), strict=True):
                records[place] = record
        return cast("list[Record]", records)

    def _shard(self, number: int) -> Shard:
        if number not in self._shards:
            while len(self._shards) >= MOST_OPEN:  # the one opened longest ago
                del self._shards[next(iter(self._shards))]
            if number >= len(self.manifest.shards):
                raise CacheError(
                    f"{self.folder}: the index names a shard {number}, and there are {len(self.manifest.shards)}. Build it again."
                )
            info = self.manifest.shards[number]
            self._shards[number] = Shard.open(self.folder / info.name, info, self.manifest.columns)
        return self._shards[number]

    def refuse_absent(self, spec: SignalSpec) -> None:
        """See that all these signals are stored.

        Raises:
            CacheError: naming those that are not.
        """
        absent = sorted(
            field_of(key) for key in (spec.hidden_states - self.spec.hidden_states) | (spec.attention_scores - self.spec.attention_scores)
        )
        absent += ["logits"] if spec.logits and not self.spec.logits else []
        if absent:
            held = sorted(field_of(key) for key in self.spec.hidden_states | self.spec.attention_scores) + ["logits"] * self.spec.logits
            raise CacheError(
                f"The losses ask for {', '.join(absent)}, and the teacher on disk ({self.folder}) holds {', '.join(held)}. Take the "
                "recipe and the layer map that it was built with (leave --distill_recipe and --distill_layer_map out), or build another."
            )

    def _refuse_no_view(self) -> None:
        held = self.stored.selection
        ranked = all(f"{field_of(key)}.importance" in self.columns for key in self.spec.hidden_states)
        # Which layers there are is seen when the losses ask for them.
        reason = self.selection.within(held, layers=(), stored_layers=(), importance=(held.rank_by,) if ranked else ())
        if reason is not None:
            raise CacheError(
                f"The teacher on disk in {self.folder} cannot be read as {self.selection.describe()}: {reason}. It was built with "
                f"{held.describe()}; ask for no more than that, or build another in another folder."
            )

    def _stored_spaces(self) -> dict[str, Space]:
        if self.manifest.shared is None:
            return {}
        found = hash_file(self.folder / SHARED_FILE).hash
        if found != self.manifest.shared:
            raise CacheError(
                f"{self.folder / SHARED_FILE} has the hash {found}; expected {self.manifest.shared}, as the manifest says. Copy it again, "
                "or build the cache again."
            )
        return read_spaces(self.folder, self.selection)

    def _wanted_spaces(self, stored: dict[str, Space]) -> dict[str, Space]:
        """The dimensions that a smaller selection shares."""
        wanted, held = self.selection, self.stored.selection
        if wanted.width_scheme in ("all", "magnitude"):
            return {}
        if (wanted.width_scheme, wanted.width) == (held.width_scheme, held.width):
            return stored
        sizes = {field_of(key): self.manifest.teacher.stacks[key.stack]["hidden_size"] for key in self.spec.hidden_states}
        if held.width_scheme != "pca":
            return make_spaces(wanted, sizes, self._sample() if needs_sample(wanted) else {})
        first = {name: space for name, space in stored.items() if isinstance(space, Subspace)}
        return {name: Subspace(space.mean, space.components[:, : wanted.num_dimensions(sizes[name])]) for name, space in first.items()}

    def _sample(self) -> dict[str, torch.Tensor]:
        """(tokens, hidden) of each field: what a basis is learnt on, of the same examples that a builder takes."""
        whole = replace(self.selection, width=1.0, width_scheme="all")
        assembler = Assembler(self.columns, self.stored.selection, whole, self.stored.codec, {}, {}, self._hidden_sizes)
        states: dict[str, list[torch.Tensor]] = {field_of(key): [] for key in self.spec.hidden_states}
        places = self.index.places[:SAMPLE_EXAMPLES].astype(np.int64)
        group = "tokens" if self.stored.selection.length == "all" else "selected"
        stack = next(iter(self.spec.hidden_states)).stack
        selectable = [
            self._shard(shard).counts(row)[f"{group}.{stack}"]
            for shard, row in zip(*map(np.ndarray.tolist, split_places(places)), strict=True)
        ]
        size = sample_size(selectable, self.selection)
        for start in range(0, size, 32):
            rows = slice(start, min(start + 32, size))
            records = self._records(self.index.places[rows].astype(np.int64), np.ascontiguousarray(self.index.keys[rows]))
            for key in self.spec.hidden_states:
                column = f"{field_of(key)}.{'values' if self.stored.selection.length == 'all' else 'positions'}"
                lengths = np.array([len(record[column]) for record in records], dtype=np.int64)
                batch = Canonical({}, np.zeros_like(lengths), lengths, int(lengths.max()))
                state = assembler.assemble(records, batch, SignalSpec(hidden_states=frozenset({key})))
                if key in state.hidden_states:
                    real = torch.arange(batch.width) < torch.from_numpy(lengths)[:, None]
                    states[field_of(key)].append(state.hidden_states[key][real].float())
                else:
                    selected = state.selected_states[key]
                    states[field_of(key)].append(selected.values[selected.chosen].float())
        return {name: torch.cat(parts) for name, parts in states.items()}
