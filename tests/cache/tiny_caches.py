"""Caches of tiny teachers, built by the package's own builder; and what those teachers say, asked one unpadded example at a time."""

from __future__ import annotations

import inspect
import threading
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from hf_compress.cache.build import CacheBuilder, CacheContents
from hf_compress.cache.codec_name import CodecName
from hf_compress.cache.examples import Examples
from hf_compress.cache.key import Canonical, canonical_examples
from hf_compress.cache.manifest import SHARED_FILE
from hf_compress.cache.predictions import TopK
from hf_compress.cache.reader import TeacherCache
from hf_compress.cache.selection import Selection
from hf_compress.cache.teacher_rows import TeacherRun
from hf_compress.layers.stack import find_stacks
from hf_compress.signals import AttentionScores, HiddenState, Signals, SignalSource, SignalSpec
from hf_compress.task import ModelShape
from hf_compress.teacher import LiveTeacher
from hf_compress.teacher_identity import identity_of, logits_shapes, stack_sizes

Example = dict[str, list[int]]
Collator = Callable[[list[Any]], dict[str, Tensor]]

ONE_AT_A_TIME = threading.Lock()  # attention is listened to by name, for a whole process
SPECIAL = (1, 2)
COLUMNS = frozenset({"input_ids", "attention_mask", "token_type_ids"})
LENGTHS = (12, 4, 9, 5, 7, 12, 5, 20, 6, 8)


def pairs(count: int = 10, vocabulary: int = 50, seed: int = 0) -> list[Example]:
    """[CLS] words [SEP] words [SEP], token type 1 in the second part; lengths differ five times."""
    generator = torch.Generator().manual_seed(seed)
    examples = []
    for number in range(count):
        length = LENGTHS[number % len(LENGTHS)]
        ids = torch.randint(3, vocabulary, (length,), generator=generator).tolist()
        ids[0], ids[length // 2], ids[-1] = 1, 2, 2
        examples.append({"input_ids": ids, "token_type_ids": [int(place > length // 2) for place in range(length)]})
    return examples


def padded(side: str = "right", more: int = 0) -> Collator:
    """A collator that pads to the longest example, and `more`; what stands at padding is no zero."""

    def collate(examples: list[Example]) -> dict[str, Tensor]:
        width = max(len(example["input_ids"]) for example in examples) + more
        columns: dict[str, list[list[int]]] = {name: [] for name in ("input_ids", "token_type_ids", "attention_mask")}
        for example in examples:
            length = len(example["input_ids"])
            for name in columns:
                values = [1] * length if name == "attention_mask" else example[name]
                filling = [0 if name == "attention_mask" else 1] * (width - length)
                columns[name].append(values + filling if side == "right" else filling + values)
        return {name: torch.tensor(values) for name, values in columns.items()}

    return collate


def canonical(examples: list[Example], collator: Collator | None = None) -> Canonical:
    """As a reader meets them in training."""
    return canonical_examples((collator or padded())(examples), COLUMNS)


def states(*layers: int) -> SignalSpec:
    """Hidden states of these layers."""
    return SignalSpec(hidden_states=frozenset(HiddenState("layers", layer) for layer in layers))


def scores(*layers: int) -> SignalSpec:
    """Attention scores of these layers."""
    return SignalSpec(attention_scores=frozenset(AttentionScores("layers", layer) for layer in layers))


def builder(
    folder: Path,
    model: nn.Module,
    data: Sequence[Any],
    spec: SignalSpec,
    selection: Selection | None = None,
    codec: CodecName = "float32",
    *,
    batch_tokens: int = 40,
    collator: Collator | None = None,
    source: SignalSource | None = None,
    distillation: Mapping[str, Any] | None = None,
    progress: bool = False,
    top: TopK | None = None,
) -> CacheBuilder:
    """A builder with a live teacher, or with `source` in its place."""
    live = source or LiveTeacher(model)
    shape = ModelShape.of(model)
    run = TeacherRun(
        source=live,
        spec=spec,
        selection=selection or Selection.everything(),
        device=torch.device("cpu"),
        forward_context=nullcontext,
        ranks=shape.shows_attention_scores,
        summary_last=frozenset(name for name, stack in find_stacks(model).items() if stack.summary_token == "last"),
        top=top,
    )
    contents = CacheContents(
        teacher=identity_of(model, "tiny", None, {}),
        tokenizer="",
        codec=codec,
        distillation=distillation or {},
        sizes=stack_sizes(shape),
        logits=logits_shapes(model) if spec.logits else {},
        version="test",
    )
    examples = Examples(data, collator or padded(), COLUMNS, SPECIAL, 0)
    return CacheBuilder(folder, examples, run, contents, progress=progress, batch_tokens=batch_tokens)


class Counting:
    """A live teacher that counts the examples it is asked for."""

    def __init__(self, model: nn.Module) -> None:
        self.live = LiveTeacher(model)
        self.asked = 0

    def signals(self, inputs: Mapping[str, Tensor], spec: SignalSpec) -> Signals:
        self.asked += len(inputs["input_ids"])
        with ONE_AT_A_TIME:
            return self.live.signals(inputs, spec)

    def close(self) -> None:
        self.live.close()


class Stopped(BaseException):
    """As ctrl-c is no Exception."""


class Stopping(Counting):
    """A live teacher whose run is stopped when it is asked for what follows so many shards."""

    def __init__(self, model: nn.Module, folder: Path, shards: int, *, basis: bool = False) -> None:
        """`basis`: not before the shared dimensions are learnt."""
        super().__init__(model)
        self.folder, self.shards, self.basis = folder, shards, basis

    def signals(self, inputs: Mapping[str, Tensor], spec: SignalSpec) -> Signals:
        learnt = not self.basis or (self.folder / SHARED_FILE).exists()
        if learnt and len(list(self.folder.glob("shard-*.safetensors"))) == self.shards:
            raise Stopped
        return super().signals(inputs, spec)


def built(folder: Path, model: nn.Module, data: Sequence[Any], spec: SignalSpec, *more: Any, **options: Any) -> TeacherCache:
    """See `builder`; the cache is open."""
    building = builder(folder, model, data, spec, *more, **options)
    building.build()
    building.run.source.close()
    return TeacherCache(folder)


class Told:
    """What a teacher says of one example, from its own outputs: nothing of hf_compress takes part.

    Attributes:
        states: (tokens, hidden) by layer, 0 the embedding output.
        probabilities: (heads, tokens, tokens) by layer, from 1.
        outputs: the model's.
    """

    def __init__(self, model: Any, example: Example) -> None:
        known = {"input_ids", "token_type_ids"} & set(inspect.signature(model.forward).parameters)
        inputs = {name: torch.tensor([example[name]]) for name in known}
        before = model.config._attn_implementation
        model.set_attn_implementation("eager")
        with torch.no_grad():
            self.outputs = model(**inputs, output_hidden_states=True, output_attentions=True)
        model.set_attn_implementation(before)
        self.states = [state[0] for state in self.outputs.hidden_states]
        self.probabilities = [None, *(attention[0] for attention in self.outputs.attentions)]
        self.ids = example["input_ids"]


def bert_scores(model: Any, example: Example, layer: int) -> Tensor:
    """QK^T/sqrt(d) of one layer of a BERT, (heads, tokens, tokens), from its query and key layers."""
    seen: dict[str, Tensor] = {}
    attention = getattr(model, "bert", model).encoder.layer[layer - 1].attention.self
    hooks = [
        getattr(attention, name).register_forward_hook(lambda module, args, output, name=name: seen.update({name: output[0]}))
        for name in ("query", "key")
    ]
    with torch.no_grad():
        model(**{name: torch.tensor([values]) for name, values in example.items()})
    for hook in hooks:
        hook.remove()
    heads = model.config.num_attention_heads
    query, key = (seen[name].unflatten(-1, (heads, -1)).transpose(0, 1) for name in ("query", "key"))
    return query @ key.transpose(1, 2) / query.shape[-1] ** 0.5


def tokens_by_hand(told: Told, selection: Selection, raw: Tensor, layer: int, summary: int = 0) -> list[int]:
    """Which tokens of an unpadded example are kept, in the order in which they are stored."""
    length = len(told.ids)
    if selection.tokens is None:
        return list(range(length))
    if selection.length == "left_first":
        return list(range(min(selection.tokens, length)))
    probabilities = told.probabilities[max(1, layer)]
    assert probabilities is not None
    importance = (raw if selection.rank_by == "scores" else probabilities)[:, summary].mean(0).tolist()
    eligible = [place for place in range(length) if selection.length == "attention" or place == summary or told.ids[place] not in SPECIAL]
    return sorted(eligible, key=lambda place: -importance[place])[: selection.tokens]


def basis_by_hand(model: Any, data: list[Example], selection: Selection, layer: int, count: int) -> tuple[Tensor, Tensor]:
    """Mean and leading directions of the selected tokens of all examples, by a singular value decomposition."""
    rows = []
    for example in data:
        told = Told(model, example)
        rows.append(told.states[layer][tokens_by_hand(told, selection, bert_scores(model, example, max(1, layer)), layer)].double())
    sample = torch.cat(rows)
    directions = torch.linalg.svd(sample - sample.mean(0), full_matrices=False).Vh[:count].T
    signs = torch.stack([column[column.abs().argmax()].sign() for column in directions.T])
    return sample.mean(0).float(), (directions * signs).float()
