"""Building a cache: every example of a data set once through the teacher, and what is kept of it to disk.

    read the examples -> plan -> price -> shared dimensions -> shard, shard, shard, ... -> index -> manifest

A shard is there whole or not at all, and the plan does not change, so a build that was stopped anywhere goes on with the shards that are
missing, with as many processes as there are then. Several processes share the shards; the first of them does what is done once.
"""

from __future__ import annotations

import datetime
import logging
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from tqdm.auto import tqdm

from hf_compress.agreement import Gather, all_or_none
from hf_compress.cache.codec_name import CodecName
from hf_compress.cache.draft import Draft, not_shared
from hf_compress.cache.encode import Encoder, Rows
from hf_compress.cache.examples import Examples, keys_and_lengths
from hf_compress.cache.fields import field_of
from hf_compress.cache.files import hash_file, remove_leftovers
from hf_compress.cache.index import write_index
from hf_compress.cache.key import Integers
from hf_compress.cache.lock import builder_lock, remove_lock
from hf_compress.cache.manifest import FORMAT_VERSION, INDEX_FILE, MANIFEST_FILE, SHARED_FILE, Manifest, TeacherIdentity
from hf_compress.cache.plan import Plan, make_plan
from hf_compress.cache.price import Price, epochs_to_pay_back, example_bytes, free_bytes, readable, refuse_too_little_disk
from hf_compress.cache.shard import Column, ShardInfo, shard_name, write_shard
from hf_compress.cache.shard_reader import Shard, read_shard_info
from hf_compress.cache.shares import shares
from hf_compress.cache.spaces import (
    blank_spaces,
    make_spaces,
    needs_sample,
    read_spaces,
    sample_size,
    spaces_bytes,
    write_spaces,
)
from hf_compress.cache.stack_sizes import StackSizes
from hf_compress.cache.teacher_rows import Said, TeacherRun, blank_signals
from hf_compress.errors import CacheError

logger = logging.getLogger(__name__)

# What one forward of the teacher gets, padding included: enough for a GPU to be busy, little enough for a processor's caches.
BATCH_TOKENS = {"cuda": 32768}
CPU_BATCH_TOKENS = 4096
# What the teacher said ahead, to learn a basis or to be timed, is kept until it is written, so that it is not asked twice: so much at most.
AHEAD_BYTES = 256 * 2**20


@dataclass(frozen=True)
class Processes:
    """The processes that build together.

    Attributes:
        rank, count: which of how many this one is.
        gather: every process's list, joined by rank, the same on all; nobody goes on before all are here.
    """

    rank: int = 0
    count: int = 1
    gather: Gather = field(default=lambda own: own)

    def together(self) -> AbstractContextManager[None]:
        """See `all_or_none`."""
        return all_or_none(self.gather)


@dataclass(frozen=True)
class CacheContents:
    """What a cache is to hold, and of whom: its manifest before there are records.

    Attributes:
        teacher: who it is.
        tokenizer: hash of the vocabulary; "" where it is not known.
        codec: number format of hidden states and attention scores.
        distillation: what a later run needs to train as this one does: losses, layer map.
        sizes: by stack.
        logits: by name, the shape of one example's logits; -1 stands for its tokens.
        version: of hf_compress.
    """

    teacher: TeacherIdentity
    tokenizer: str
    codec: CodecName
    distillation: Mapping[str, Any]
    sizes: Mapping[str, StackSizes]
    logits: Mapping[str, tuple[int, ...]]
    version: str


class CacheBuilder:
    """Builds one cache; `build` does all of it.

    Args:
        folder: where it goes; made if need be.
        examples: the data set.
        run: the teacher.
        contents: what is stored.
        processes: who else builds.
        progress: whether to show a bar.
        batch_tokens: tokens a forward, padding included.
    """

    def __init__(
        self,
        folder: Path,
        examples: Examples,
        run: TeacherRun,
        contents: CacheContents,
        *,
        processes: Processes | None = None,
        progress: bool = True,
        batch_tokens: int | None = None,
    ) -> None:
        self.folder, self.examples, self.run, self.contents = folder, examples, run, contents
        self.processes = processes or Processes()
        self._shows = progress and self.processes.rank == 0
        self._batch_tokens = batch_tokens or BATCH_TOKENS.get(run.device.type, CPU_BATCH_TOKENS)
        self._hidden_sizes = {field_of(key): contents.sizes[key.stack].hidden_size for key in run.spec.hidden_states}
        # An example of so many made-up zeros is encoded as the real ones will be, and so tells bytes and columns beforehand.
        self._blank_spaces = blank_spaces(run.selection, self._hidden_sizes)
        self._blank_encoder = Encoder(run.selection, contents.codec, self._blank_spaces)
        self._blank_signals = blank_signals(run.spec, run, contents.sizes, contents.logits)
        self._example_bytes = example_bytes(self._blank_encoder, self._blank_signals)
        # By the batch's place in the plan; and of each how many tokens, in how many seconds.
        self._ahead: dict[int, Said] = {}
        self._timed: list[tuple[int, float]] = []

    def build(self) -> Manifest:
        """Build what is missing.

        Raises:
            CacheError: too little disk, another builder at work, or a cache begun with other settings in that folder.
            TeacherError: the teacher gives values that are not finite.
        """
        first, together = self.processes.rank == 0, self.processes.together
        with ExitStack() as stack:
            # A data loader draws a seed; the student's dropout shall not hang on whether the teacher was on disk already.
            stack.enter_context(torch.random.fork_rng(devices=[]))
            with together():
                if first:
                    self.folder.mkdir(parents=True, exist_ok=True)
                    stack.enter_context(builder_lock(self.folder))
                    self._refuse_finished()
                    remove_leftovers(self.folder)
                plan = self._plan()
                draft = self._draft(plan)
            draft.agree_among(self.processes.gather([draft]))
            with together():
                if first:
                    draft.agree_with(self.folder)
                    price = self._price(plan)
                    draft.save(self.folder)
                    logger.info("teacher on disk: %s (%s free)", price, readable(price.free))
            present = self.processes.gather(self._numbers_present(plan) if first else [])
            own = shares(plan, present, self.processes.count)[self.processes.rank]
            with together():
                draft.see_in(self.folder)
                sample = self._sample(plan, own)
            sampled = self.processes.gather(sample)
            with together():
                if first:
                    self._spaces(sampled)
            left = [number for number in range(len(plan.shards)) if number not in set(present)]
            if first:
                self._say_how_long(plan, left, sorted(set(own) & set(left)))
            encoder = Encoder(self.run.selection, self.contents.codec, read_spaces(self.folder, self.run.selection))
            infos = self.processes.gather(list(self._shards(plan, own, encoder)))
            finished = []
            with together():
                if first:
                    finished = [self._finish(plan, sorted(infos, key=lambda item: item[0].name))]
            (manifest,) = self.processes.gather(finished)
        return cast(Manifest, manifest)

    def _refuse_finished(self) -> None:
        if (self.folder / MANIFEST_FILE).exists():
            raise CacheError(
                f"The teacher on disk in {self.folder} was finished by another process while this one was set up. Start this run again: it "
                "will read it."
            )

    def _draft(self, plan: Plan) -> Draft:
        spec = self.run.spec
        return Draft.of(
            teacher=self.contents.teacher,
            tokenizer=self.contents.tokenizer,
            selection=self.run.selection,
            codec=self.contents.codec,
            signals={
                "logits": spec.logits,
                "hidden_states": sorted(field_of(key) for key in spec.hidden_states),
                "attention_scores": sorted(field_of(key) for key in spec.attention_scores),
                "attention_vectors": sorted(field_of(key) for key in spec.attention_vectors),
                **({} if self.run.top is None else {"top_logits": asdict(self.run.top)}),
            },
            distillation=self.contents.distillation,
            plan=plan,
            batch_tokens=self._batch_tokens,
        )

    def _plan(self) -> Plan:
        with tqdm(total=len(self.examples), desc="reading the examples", unit="ex", disable=not self._shows) as bar:
            keys, lengths = keys_and_lengths(self.examples, bar.update)
        return make_plan(
            keys, lengths, batch_tokens=self._batch_tokens, example_bytes=self._example_bytes, sample_size=self._size_of_sample
        )

    def _size_of_sample(self, lengths: Integers) -> int:
        return sample_size(lengths, self.run.selection) if needs_sample(self.run.selection) else 0

    def _price(self, plan: Plan) -> Price:
        total = sum(self._example_bytes(length) for length in plan.lengths.tolist())
        total += spaces_bytes(self._blank_spaces)
        price = Price(plan.examples, plan.tokens, int(total), free_bytes(self.folder))
        present = sum(path.stat().st_size for path in self.folder.glob("shard-*.safetensors"))
        refuse_too_little_disk(price, self.folder, present)
        return price

    def _numbers_present(self, plan: Plan) -> list[int]:
        """The shards that an earlier build left; whether they are whole is seen later."""
        return [number for number in range(len(plan.shards)) if (self.folder / shard_name(number)).exists()]

    def _say_how_long(self, plan: Plan, left: list[int], own: list[int]) -> None:
        """Time the teacher, if there is enough left to do, and somebody who reads it."""
        if not own or len(plan.batches) < 4 * self.processes.count or not logger.isEnabledFor(logging.INFO):
            return
        if not self._timed:
            batches = plan.batches[plan.shards[own[0]]]
            for batch in dict.fromkeys((0, len(batches) // 2)):
                self._ask_ahead(plan, batches[batch])
        timed = self._timed[1:] or self._timed  # the first forward of all is slower
        rate = sum(tokens for tokens, _ in timed) / sum(seconds for _, seconds in timed) * self.processes.count
        tokens = sum(int(plan.lengths[plan.span(number)].sum()) for number in left)
        built = sum(int(plan.lengths[batch].max()) * (batch.stop - batch.start) for batch in plan.batches)
        logger.info(
            "building takes about %s at %s tokens a second; it pays back after %.1f epochs of a live teacher",
            datetime.timedelta(seconds=round(tokens / rate)),
            f"{rate:,.0f}",
            epochs_to_pay_back(plan.lengths, built),
        )

    def _sample(self, plan: Plan, own: Iterable[int]) -> list[tuple[int, dict[str, torch.Tensor]]]:
        """What the sample for shared dimensions shows in this process's shards: by the batch's place, the selected states of each field."""
        if (self.folder / SHARED_FILE).exists() or not needs_sample(self.run.selection):
            return []
        batches = [batch for shard in own for batch in plan.batches[plan.shards[shard]] if batch.start < plan.sample]
        found = []
        for batch in tqdm(batches, desc="learning the pca basis", unit="batch", disable=not self._shows):
            states = self.run.selected_states(self._ask_ahead(plan, batch))
            found.append((batch.start, {field_of(key): values for key, values in states.items()}))
        return found

    def _spaces(self, sampled: list[tuple[int, dict[str, torch.Tensor]]]) -> None:
        """Choose the shared dimensions; those that a stopped build chose are kept."""
        if (self.folder / SHARED_FILE).exists():
            return
        ordered = [states for _, states in sorted(sampled, key=lambda part: part[0])]
        sample = {name: torch.cat([states[name] for states in ordered]) for name in self._hidden_sizes if ordered}
        write_spaces(self.folder, make_spaces(self.run.selection, self._hidden_sizes, sample))

    def _shards(self, plan: Plan, own: list[int], encoder: Encoder) -> Iterator[tuple[ShardInfo, tuple[Column, ...]]]:
        """This process's shards: those that are there already, and the others."""
        total = sum(plan.span(shard).stop - plan.span(shard).start for shard in own)
        written = 0
        with tqdm(total=total, desc="asking the teacher", unit="ex", disable=not self._shows) as bar:
            for shard in own:
                span = plan.span(shard)
                path = self.folder / shard_name(shard)
                found = self._present(path, plan, span)
                if found is None:
                    found = self._write(path, plan, shard, encoder, bar)
                else:
                    bar.update(span.stop - span.start)
                    if not bar.disable:
                        bar.initial += span.stop - span.start  # the rate is the teacher's, not that of what was there
                written += found[0].bytes
                bar.set_postfix_str(f"{readable(written)} written")
                yield found

    def _present(self, path: Path, plan: Plan, span: slice) -> tuple[ShardInfo, tuple[Column, ...]] | None:
        """A whole shard that an earlier build left, of just these examples."""
        if not path.exists():
            return None
        signals, importance = self._blank_signals(2)
        real = torch.ones(1, 2, dtype=torch.bool)
        columns = tuple(self._blank_encoder.encode(signals, real, torch.zeros_like(real), importance).columns.values())
        try:
            shard = Shard.open(path, None, columns)
            if np.array_equal(shard.keys, plan.keys[span]):
                return read_shard_info(path, columns), columns  # looks at every record
        except CacheError as error:
            logger.warning("%s; it is built anew", error)
        return None

    def _write(self, path: Path, plan: Plan, shard: int, encoder: Encoder, bar: Any) -> tuple[ShardInfo, tuple[Column, ...]]:
        parts: list[Rows] = []
        for batch in plan.batches[plan.shards[shard]]:
            said = self._ahead.pop(batch.start, None) or self._ask(plan, batch)
            parts.append(said.rows(encoder))
            bar.update(batch.stop - batch.start)
        rows = Rows.joined(parts)
        columns = tuple(rows.columns.values())
        keys = np.ascontiguousarray(plan.keys[plan.span(shard)])
        return write_shard(path, keys, columns, rows.values, rows.counts), columns

    def _ask(self, plan: Plan, batch: slice) -> Said:
        examples = self.examples.canonical(plan.order[batch].tolist())
        if not np.array_equal(examples.keys(), plan.keys[batch]):
            raise CacheError(
                "The data set gave other examples when it was read a second time, so what the teacher says of them cannot be stored. "
                "Look for a transform or a collator that draws at random."
            )
        return self.run.ask(*self.examples.padded(examples))

    def _ask_ahead(self, plan: Plan, batch: slice) -> Said:
        """Ask before it is time to store, and keep the answer till then if there is room."""
        started = time.perf_counter()
        said = self._ask(plan, batch).on_cpu()
        self._timed.append((int(plan.lengths[batch].sum()), time.perf_counter() - started))
        if sum(kept.nbytes for kept in self._ahead.values()) + said.nbytes <= AHEAD_BYTES:
            self._ahead[batch.start] = said
        return said

    def _finish(self, plan: Plan, shards: list[tuple[ShardInfo, tuple[Column, ...]]]) -> Manifest:
        """Write the index, and then the manifest, by which the cache is whole."""
        names = [shard_name(number) for number in range(len(plan.shards))]
        infos, columns = [info for info, _ in shards], shards[0][1]
        assert [info.name for info in infos] == names
        if elsewhere := [name for name in names if not (self.folder / name).exists()]:
            raise not_shared(self.folder, elsewhere[0])
        index = write_index(self.folder / INDEX_FILE, (plan.keys[plan.span(number)] for number in range(len(names))))
        spaces = hash_file(self.folder / SHARED_FILE) if (self.folder / SHARED_FILE).exists() else None
        manifest = Manifest(
            format_version=FORMAT_VERSION,
            created=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            hf_compress_version=self.contents.version,
            teacher=self.contents.teacher,
            tokenizer=self.contents.tokenizer,
            input_columns=tuple(sorted(self.examples.columns)),
            selection={**self.run.selection.to_json(), "codec": self.contents.codec},
            distillation=dict(self.contents.distillation),
            columns=columns,
            shared=spaces.hash if spaces else None,
            index=index.hash,
            shards=tuple(infos),
            examples=plan.examples,
            tokens=plan.tokens,
            bytes=sum(info.bytes for info in infos) + index.bytes + (spaces.bytes if spaces else 0),
        )
        manifest.save(self.folder)
        Draft.remove(self.folder)
        remove_lock(self.folder)
        return manifest
