"""The sample that `distortion` measures on: of a teacher's states, or of those that a cache holds. The same for everybody: by keys."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from hf_compress.cache.distortion import NEVER, Sample, SampledBatch
from hf_compress.cache.examples import Examples
from hf_compress.cache.fields import field_of
from hf_compress.cache.key import Canonical, Integers
from hf_compress.cache.plan import Plan
from hf_compress.cache.reader import TeacherCache
from hf_compress.cache.select import nobody
from hf_compress.cache.selection import LengthScheme
from hf_compress.cache.shard_reader import Record
from hf_compress.cache.teacher_rows import TeacherRun
from hf_compress.cache.tokens import choose_tokens
from hf_compress.signals import SignalSpec

# The examples with the smallest keys, as good as drawn at random; so many at most, and no more when they have so many tokens.
MEASURED_EXAMPLES = 256
MEASURED_TOKENS = 4096
# Tokens of one forward, padding included.
_BATCH_TOKENS = 2048


def sample_of_teacher(run: TeacherRun, examples: Examples, plan: Plan) -> Sample:
    """Ask the teacher for some examples.

    Args:
        run: of all layers that count, all tokens and dimensions.
        examples: the data.
        plan: which of them there are.
    """
    by_key = plan.by_key
    drawn = np.sort(by_key[: _enough(plan.lengths[by_key])])  # by falling length, as the plan is
    size = max(1, _BATCH_TOKENS // max(1, int(plan.lengths[drawn[0]])))
    places = [plan.order[drawn[start : start + size]].tolist() for start in range(0, len(drawn), size)]
    return Sample.of(_asked(run, *examples.padded(examples.canonical(batch))) for batch in places)


def sample_of_cache(folder: Path) -> Sample:
    """Read some examples of a cache; what it has left out already counts for nothing."""
    return Sample.of(_Sampled(folder).batches())


def _enough(lengths: Integers) -> int:
    """How many examples, in this order, make a sample; two at least."""
    within = int((np.cumsum(lengths) <= MEASURED_TOKENS).sum())
    return min(len(lengths), MEASURED_EXAMPLES, max(2, within))


def _asked(run: TeacherRun, inputs: dict[str, Tensor], real: Tensor, special: Tensor) -> SampledBatch:
    said = run.ask(inputs, real, special)
    states = {key.layer: states.float().cpu() for key, states in said.signals.hidden_states.items()}
    return _batch(states, real, said.special, {key.layer: each for key, each in said.importance.items()})


def _batch(states: dict[int, Tensor], real: Tensor, special: Tensor, importance: dict[int, Tensor]) -> SampledBatch:
    """Rank the tokens of each layer, by attention where it is known, else from left to right."""
    ranks = {layer: _ranks(real, special, importance.get(layer)) for layer in states}
    if not importance:
        return SampledBatch(states, real, ranks, None)
    return SampledBatch(states, real, ranks, torch.stack(list(importance.values())).mean(0).masked_fill(special | ~real, 0.0))


def _ranks(real: Tensor, special: Tensor, importance: Tensor | None) -> Tensor:
    scheme: LengthScheme = "left_first" if importance is None else "attention_no_sep"
    positions, chosen = choose_tokens(scheme, real.shape[1], real, special, importance, nobody(real))
    ranks = torch.full(real.shape, NEVER, dtype=torch.int64)
    rows, places = chosen.nonzero(as_tuple=True)
    ranks[rows, positions[rows, places]] = places
    return ranks


class _Sampled(TeacherCache):
    """A cache, of which some records are read without their examples."""

    def batches(self) -> Iterator[SampledBatch]:
        keys = self.index.keys[:MEASURED_EXAMPLES]
        places = self.index.places[:MEASURED_EXAMPLES].astype(np.int64)
        records = self._records(places, np.ascontiguousarray(keys))
        key = min(self.spec.hidden_states)
        counted = f"special.{key.stack}" if self.stored.selection.length == "all" else f"{field_of(key)}.positions"
        lengths = np.array([len(record[counted]) for record in records], dtype=np.int64)
        for start in range(0, _enough(lengths), 32):
            rows = slice(start, min(start + 32, _enough(lengths)))
            yield self._batch(records[rows], lengths[rows])

    def _batch(self, records: Sequence[Record], lengths: Integers) -> SampledBatch:
        width = max(1, int(lengths.max(initial=0)))
        batch = Canonical({}, np.zeros_like(lengths), lengths, width)
        real = torch.arange(width) < torch.from_numpy(lengths)[:, None]
        states: dict[int, Tensor] = {}
        importance: dict[int, Tensor] = {}
        special = torch.zeros_like(real)
        for key in sorted(self.spec.hidden_states):
            signals = self._assembler.assemble(records, batch, SignalSpec(hidden_states=frozenset({key})))
            found = signals.hidden_states.get(key)
            states[key.layer] = (signals.selected_states[key].values if found is None else found).float()
            if self.stored.selection.length == "all":
                special = _padded([record[f"special.{key.stack}"] for record in records], width).bool()
            if f"{field_of(key)}.importance" in self.columns:
                importance[key.layer] = _padded([record[f"{field_of(key)}.importance"] for record in records], width)
        # Tokens that were selected stand in the order in which they were chosen, or from left to right: fewer are the first of them.
        return _batch(states, real, special, importance)


def _padded(values: Sequence[np.ndarray[tuple[int, ...], np.dtype[np.float32]]], width: int) -> Tensor:
    padded = torch.zeros(len(values), width)
    for row, one in enumerate(values):
        padded[row, : len(one)] = torch.from_numpy(one.astype(np.float32))
    return padded
