"""A view of a cache for so many bytes: chosen as for a build, of what the larger cache can be read as, without a teacher."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np

from hf_compress.cache.budget import CODECS, Choices, Possible, choose, depths_of, possible_tokens, possible_widths
from hf_compress.cache.codec_name import CodecName
from hf_compress.cache.copy_view import View, records_at_once, signals_of_view
from hf_compress.cache.distortion import Distortion
from hf_compress.cache.estimate import TeacherSizes
from hf_compress.cache.fields import scores_group, selected_group, tokens_group
from hf_compress.cache.file_sizes import FileSizes, Records
from hf_compress.cache.index import split_places
from hf_compress.cache.key import Integers
from hf_compress.cache.reader import TeacherCache
from hf_compress.cache.sampling import sample_of_cache
from hf_compress.cache.selection import Selection
from hf_compress.cache.shard import ROWS
from hf_compress.cache.spaces import sampled_tokens
from hf_compress.cache.tensor_file import TensorFile
from hf_compress.errors import CacheError
from hf_compress.signals import SignalSpec

# No view is better than what it is read from.
_CODECS_OF: Mapping[CodecName, tuple[CodecName, ...]] = {
    "float32": CODECS,
    "float16": CODECS,
    "bfloat16": ("bfloat16", "int8"),
    "int8": ("int8",),
}


def choose_view(folder: Path, budget: int, codec: CodecName | None, *, attention_scores: bool, in_parts: bool) -> Choices:
    """Choose a view that loses least of what a cache holds.

    Args:
        folder: the cache.
        budget: bytes of the view.
        codec: the only number format; None for those that lose little.
        attention_scores: whether those that are stored are kept, and vectors.
        in_parts: whether tokens and dimensions may be left out.

    Raises:
        ArgumentError: nothing fits.
        CacheError: the cache is damaged, or holds no hidden states.
    """
    larger = TeacherCache(folder)
    stored = larger.stored.selection
    if not larger.spec.hidden_states:
        raise CacheError(f"The teacher on disk in {folder} holds no hidden states to choose from.")

    def asked(selection: Selection) -> SignalSpec:
        return signals_of_view(folder, View(selection, "", attention_scores=attention_scores))

    teacher = TeacherSizes.of(larger.manifest, stored)
    records, starts = _records(larger, teacher.ranks)
    hidden = max(teacher.stacks[key.stack].hidden_size for key in larger.spec.hidden_states)
    narrower = in_parts and stored.width_scheme in ("all", "pca")
    fewer = in_parts and stored.width_scheme != "magnitude"  # its entries are those of all stored tokens together
    codecs = (codec,) if codec is not None else _CODECS_OF[larger.stored.codec]
    possible = Possible(
        depths=depths_of(asked, stored),
        tokens=possible_tokens(int(records.choosable.max()), stored.tokens) if fewer else (stored.tokens,),
        length=stored.length if stored.tokens is not None else "attention_no_sep" if teacher.ranks else "left_first",
        widths=possible_widths(hidden, stored.width) if narrower else (),
        whole=(stored.width, stored.width_scheme),
        codecs=codecs,
        other=stored,
        learnt_on=_learnt_on(larger, records, starts) if stored.width_scheme == "all" else lambda tokens: hidden,
    )

    def measure() -> Distortion:
        # The directions of a stored basis are there in their order; fewer of them are the first.
        return Distortion(sample_of_cache(folder), possible.dimensions(hidden), codecs, rotate=stored.width_scheme != "pca")

    return choose(budget, possible, FileSizes(records, teacher), measure)


def _records(larger: TeacherCache, ranked: bool) -> tuple[Records, list[int]]:
    """The records in the order of the shards; and where each shard's begin."""
    stack = min(larger.spec.hidden_states).stack
    dense = larger.stored.selection.length == "all"
    tokens: list[Integers] = []
    choosable: list[Integers] = []
    batches: list[slice] = []
    starts: list[int] = []
    begin = 0
    for info in larger.manifest.shards:
        file = TensorFile(larger.folder / info.name)
        offsets = {group: file.array(f"{ROWS}{group}").astype(np.int64) for group in info.rows}
        counts: dict[str, Integers] = {group: each[1:] - each[:-1] for group, each in offsets.items()}
        held = counts[tokens_group(stack) if dense else selected_group(stack)]
        known = counts.get(tokens_group(stack))
        if known is None and scores_group(stack) in counts:  # the square of its tokens for each head
            heads = larger.manifest.teacher.stacks[stack]["num_attention_heads"]
            known = np.sqrt(counts[scores_group(stack)] // heads).round().astype(np.int64)
        tokens.append(held if known is None else known)
        if dense and ranked:
            special = np.concatenate([[0], np.cumsum(file.array(f"special.{stack}"), dtype=np.int64)])
            ends = np.cumsum(held)
            held = held - (special[ends] - special[ends - held])
        choosable.append(held)
        starts.append(begin)
        batches += _batches(counts, info.examples, begin)
        begin += info.examples
    return Records(np.concatenate(tokens), np.concatenate(choosable), batches, planned=False), starts


def _batches(counts: Mapping[str, Integers], examples: int, begin: int) -> list[slice]:
    """What a view reads at once of a shard; see `copy_view`."""
    found, start = [], 0
    while start < examples:
        longest = max((int(count[start]) for group, count in counts.items() if group.startswith(tokens_group(""))), default=0)
        stop = min(start + records_at_once(longest), examples)
        found.append(slice(begin + start, begin + stop))
        start = stop
    return found


def _learnt_on(larger: TeacherCache, records: Records, starts: list[int]) -> Callable[[int | None], int]:
    """How many tokens the sample has that a view's pca basis is learnt on; see `TeacherCache.sampled`."""
    shards, rows = split_places(larger.index.places[larger.sampled()].astype(np.int64))
    drawn = np.array(starts, dtype=np.int64)[shards] + rows
    lengths = records.tokens if larger.stored.selection.length == "all" else records.choosable
    return sampled_tokens(lengths[drawn], records.choosable[drawn])
