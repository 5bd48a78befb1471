"""A finished cache, open for reading: keys -> records -> signals.

Everything is mapped into memory, nothing is held: what a batch needs is read when it is asked for.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from huggingface_hub import CommitInfo

from hf_compress.cache.assemble import Assembler, BatchRoom
from hf_compress.cache.codec_name import CODEC_NAMES, CodecName
from hf_compress.cache.fields import field_of, selected_group, stored_signals, tokens_group
from hf_compress.cache.files import hash_file
from hf_compress.cache.hub import local_folder
from hf_compress.cache.hub_address import HubAddress
from hf_compress.cache.hub_push import push
from hf_compress.cache.index import Index, split_places
from hf_compress.cache.key import Canonical, Keys
from hf_compress.cache.manifest import SHARED_FILE, Manifest
from hf_compress.cache.predictions import TopK
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
        if codec not in CODEC_NAMES:
            raise CacheError(f"The manifest's codec is {codec!r}; expected one of {', '.join(CODEC_NAMES)}. Build the cache again.")
        return cls(Selection.from_json(entries), cast(CodecName, codec))


def selection_of_view(asked: Selection, stored: Selection) -> Selection:
    """What is asked, its depth counted in the pairs of layers that are stored where it says nothing else."""
    if asked.depth.scheme is not None or asked.depth.pairs is not None:
        return asked
    return replace(asked, depth=Depth(asked.depth.layers or stored.depth.layers, stored.depth.scheme, stored.depth.pairs))


def _open(folder: Path) -> tuple[Manifest, Index]:
    """Manifest and index, of one moment."""
    while True:
        manifest = Manifest.load(folder)
        try:
            return manifest, Index.open(folder / manifest.index_file, manifest.examples)
        except CacheError:
            # Between the two somebody may have appended to the cache, who takes the old index away.
            if Manifest.load(folder) == manifest:
                raise


class TeacherCache:
    """A cache, open.

    Args:
        folder: of a finished cache; or where one is on the Hugging Face hub, `hf://datasets/USER/NAME`, from where it is downloaded once.
        selection: a smaller selection to read it as; None for what it was built with.

    Attributes:
        manifest: what the cache is.
        spec: which signals it can show.
        stored: how hidden states are stored.
        selection: what is read of them.
        top: how much of a language model's logits is stored; None where they are whole, or there are none.

    Raises:
        CacheError: if it is unfinished, damaged, or cannot be read as `selection`.
    """

    def __init__(self, folder: str | Path, *, selection: Selection | None = None) -> None:
        self.folder = local_folder(folder)
        self.manifest, self.index = _open(self.folder)
        self.stored = StoredHow.of(self.manifest)
        self.selection = self.stored.selection if selection is None else selection_of_view(selection, self.stored.selection)
        self.columns = {column.name: column for column in self.manifest.columns}
        self.top = TopK.of(self.manifest.columns)
        self.spec = stored_signals(list(self.columns))
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
            self.manifest.teacher.vocab_size,
        )

    def __len__(self) -> int:
        return self.manifest.examples

    def __reduce__(self) -> tuple[Callable[..., TeacherCache], tuple[Any, ...]]:
        """For workers: maps are opened anew there."""
        return _opened_anew, (type(self), self.folder, self.selection, self._assembler.label_order, self._assembler.top_k)

    def reader(self) -> TeacherCache:
        """The same cache for another thread: it has open shards of its own, since they are opened and let go without a lock."""
        other = object.__new__(type(self))
        other.__dict__.update(self.__dict__)
        other._shards = {}
        return other

    def refreshed(self) -> TeacherCache:
        """The same cache, with what was appended since it was opened; dimensions that this view of it chose stay as they are.

        Raises:
            CacheError: if another one lies in the folder by now.
        """
        other = self.reader()
        other.manifest, other.index = _open(self.folder)
        if not other.manifest.continues(self.manifest):
            raise CacheError(f"In {self.folder} lies another teacher on disk than when this run began. Start again.")
        return other

    def put_labels_in_order(self, label_order: Sequence[int] | None) -> None:
        """Give logits in the student's order of labels; see `LiveTeacher`."""
        self._assembler.label_order = None if label_order is None else torch.tensor(label_order)

    def keep_top(self, k: int) -> None:
        """Read a language model's logits as the `k` largest.

        Raises:
            CacheError: it holds fewer, or whole ones.
        """
        if self.top is None or k > self.top.k:
            held = "whole logits, or none" if self.top is None else self.top.describe()
            raise CacheError(
                f"--teacher_cache_logits_top_k {k}, and the teacher on disk in {self.folder} holds {held}. Leave it out, or build another "
                "in another folder."
            )
        self._assembler.top_k = k

    def missing(self, keys: Keys) -> int:
        """How many of these examples (n, 2) it does not hold."""
        return int((self.index.find(keys) < 0).sum())

    def missing_rows(self, batch: Canonical) -> np.ndarray[tuple[int, ...], np.dtype[np.int64]]:
        """Which examples of a batch it does not hold."""
        return np.flatnonzero(self.index.find(batch.keys()) < 0)

    def read(self, batch: Canonical, spec: SignalSpec, *, decoded: bool = True) -> Signals:
        """What the teacher showed for a batch.

        Args:
            batch: the examples, and where their tokens stand.
            spec: which signals.
            decoded: False leaves whole hidden states as they are stored, see `Signals.scales`.

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
                "or is it other data? Build a cache of this data in another folder (--teacher_cache_dir, --teacher_model_name_or_path), or "
                "have the teacher asked for what is missing: --teacher_cache_miss live."
            )
        return self._signals(places, keys, batch, spec, decoded)

    def read_if_whole(self, batch: Canonical, spec: SignalSpec, *, decoded: bool = True) -> Signals | None:
        """As `read`; None if examples are missing."""
        self.refuse_absent(spec)
        keys = batch.keys()
        places = self.index.find(keys)
        return None if (places < 0).any() else self._signals(places, keys, batch, spec, decoded)

    def read_with(self, batch: Canonical, spec: SignalSpec, more: Mapping[tuple[int, int], Record]) -> Signals:
        """As `read`; examples that are missing are taken from `more`, whose records are what would be stored of them, by key."""
        self.refuse_absent(spec)
        keys = batch.keys()
        places = self.index.find(keys)
        here = np.flatnonzero(places >= 0)
        found = dict(zip(here.tolist(), self._records(places[here], keys[here]), strict=True))
        records = [found[row] if row in found else more[high, low] for row, (high, low) in enumerate(keys.tolist())]
        return self._assembler.assemble(records, batch, spec)

    def sampled(self) -> np.ndarray[tuple[int, ...], np.dtype[np.int64]]:
        """The index's rows of the examples that a basis is learnt on, or of more than are needed.

        What was appended is left out: a basis must not change from one run to the next.
        """
        built = len(self.manifest.shards) - self.manifest.appended
        return np.flatnonzero(self.index.places >> np.uint64(32) < built)[:SAMPLE_EXAMPLES]

    def push_to_hub(
        self,
        repo_id: str,
        *,
        private: bool | None = None,
        revision: str | None = None,
        commit_message: str | None = None,
        token: str | None = None,
    ) -> CommitInfo:
        """Put the cache on the Hugging Face hub, all of it, whatever selection it is read as; `hf://datasets/USER/NAME` is its name there.

        Args:
            repo_id: the data set repository, USER/NAME, made if need be; USER/NAME/FOLDER puts it into a folder there.
            private: whether a repository that is made is private; None for what is usual where it is made.
            revision: the branch, made if need be; None for main.
            commit_message: of the one commit that it is.
            token: of the hub; None for the one that you are logged in with.

        Raises:
            ArgumentError: no such name can be.
            CacheError: the cache is damaged, or the hub does not take it.
        """
        return push(self.folder, HubAddress.for_push(repo_id, revision), private=private, commit_message=commit_message, token=token)

    def close(self) -> None:
        """Let the maps go."""
        self._shards = {}

    def _signals(
        self, places: np.ndarray[tuple[int, ...], np.dtype[np.int64]], keys: Keys, batch: Canonical, spec: SignalSpec, decoded: bool
    ) -> Signals:
        """Copied into the batch's tensors and checked in one go."""
        room = self._assembler.room(batch, spec)
        return self._assembler.assemble(self._records(places, keys, room), batch, spec, room, decoded=decoded)

    def _records(self, places: np.ndarray[tuple[int, ...], np.dtype[np.int64]], keys: Keys, room: BatchRoom | None = None) -> list[Record]:
        records: list[Record | None] = [None] * len(places)
        shards, rows = split_places(places)
        for number in np.unique(shards).tolist():
            here = np.flatnonzero(shards == number)
            into = None if room is None else [room.rows[place] for place in here.tolist()]
            for place, record in zip(here.tolist(), self._shard(number).records(rows[here], keys=keys[here], into=into), strict=True):
                records[place] = record
        return cast("list[Record]", records)

    def _shard(self, number: int) -> Shard:
        shards = self._shards  # `close` gives it up, perhaps while another thread reads ahead
        if number not in shards:
            while len(shards) >= MOST_OPEN:  # the one opened longest ago
                del shards[next(iter(shards))]
            if number >= len(self.manifest.shards):
                raise CacheError(
                    f"{self.folder}: the index names a shard {number}, and there are {len(self.manifest.shards)}. Build it again."
                )
            info = self.manifest.shards[number]
            shards[number] = Shard.open(self.folder / info.name, info, self.manifest.columns)
        return shards[number]

    def refuse_absent(self, spec: SignalSpec) -> None:
        """See that all these signals are stored.

        Raises:
            CacheError: naming those that are not.
        """
        if spec.logits and self.top is not None and (others := sorted(spec.temperatures - self.spec.temperatures)):
            raise CacheError(
                f"The losses compare predictions at the temperature {', '.join(f'{each:g}' for each in others)}, and the teacher on disk "
                f"({self.folder}) holds {self.top.describe()}: what the others add up to hangs on the temperature. Take one of these "
                "(--distill_temperature), or build another in another folder."
            )
        absent = sorted(field_of(key) for key in spec.keys - self.spec.keys)
        absent += ["logits"] if spec.logits and not self.spec.logits else []
        if absent:
            held = sorted(field_of(key) for key in self.spec.keys) + ["logits"] * self.spec.logits
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
        sampled = self.sampled()
        places = self.index.places[sampled].astype(np.int64)
        stack = next(iter(self.spec.hidden_states)).stack
        group = tokens_group(stack) if self.stored.selection.length == "all" else selected_group(stack)
        shards = zip(*map(np.ndarray.tolist, split_places(places)), strict=True)
        selectable = np.array([self._shard(shard).counts(row)[group] for shard, row in shards], dtype=np.int64)
        size = sample_size(selectable, self.selection)
        for start in range(0, size, 32):
            rows = sampled[start : min(start + 32, size)]
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


def _opened_anew(
    kind: type[TeacherCache], folder: Path, selection: Selection, label_order: torch.Tensor | None, top_k: int | None
) -> TeacherCache:
    cache = kind(folder, selection=selection)
    cache._assembler.label_order, cache._assembler.top_k = label_order, top_k
    return cache
