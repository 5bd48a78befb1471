"""A language model's largest logits on disk: what the teacher says, to the number format's error, stopped builds and views included."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from hf_compress.cache import plan as plans
from hf_compress.cache.codec_name import CODEC_NAMES, CodecName
from hf_compress.cache.copy_view import View, copy_view
from hf_compress.cache.estimate import TeacherSizes, logits_bytes
from hf_compress.cache.file_sizes import FileSizes, Records
from hf_compress.cache.manifest import Manifest
from hf_compress.cache.missing import HowToAsk, MissingExamples
from hf_compress.cache.predictions import TopK, bytes_a_token, top_facts
from hf_compress.cache.reader import TeacherCache
from hf_compress.cache.selection import Selection
from hf_compress.cache.stack_sizes import StackSizes
from hf_compress.cache.verify import verify
from hf_compress.errors import ArgumentError, CacheError
from hf_compress.losses.logits import LogitsLoss
from hf_compress.losses.reduction import Batch
from hf_compress.signals import Signals, SignalSpec
from hf_compress.top_logits import TopLogits
from tests.cache.tiny_caches import SPECIAL, Example, Stopped, Stopping, builder, built, canonical, padded, pairs, states
from tests.tiny_models import tiny_model

DATA = pairs(24)
TOP = TopK(6, (1.0, 2.0))
ASKED = SignalSpec(logits=True, temperatures=frozenset({2.0}))
SPEC = ASKED | states(1)
# Half a step of 254 over the range of a token's six logits (below 10 here), and the same of half precision.
ERROR: dict[CodecName, float] = {"float32": 1e-5, "float16": 4e-3, "bfloat16": 3e-2, "int8": 2e-2}


def teacher(**config: Any) -> Any:
    return tiny_model("gpt2", num_layers=2, head="causal_lm", seed=1, **config)


def told(model: Any, examples: list[Example], side: str = "right") -> Tensor:
    """(batch, tokens, words), each example asked alone, put where a batch that is padded on that side has it."""
    width = max(len(example["input_ids"]) for example in examples)
    whole = torch.zeros(len(examples), width, model.config.vocab_size)
    for row, example in enumerate(examples):
        ids = torch.tensor([example["input_ids"]])
        start = 0 if side == "right" else width - ids.shape[1]
        types = torch.tensor([example["token_type_ids"]])
        with torch.no_grad():
            whole[row, start : start + ids.shape[1]] = model(input_ids=ids, token_type_ids=types).logits[0]
    return whole


def mask_of(examples: list[Example], side: str = "right") -> Tensor:
    return padded(side)(examples)["attention_mask"].bool()


def loss_of(student: Tensor, shown: Signals, mask: Tensor) -> float:
    loss = LogitsLoss(2.0, task="causal_lm", stack="layers")
    return float(loss(Signals(logits={"logits": student}), shown, Batch("causal_lm", len(mask), {"layers": mask})))


def agrees(read: TopLogits, live: Tensor, mask: Tensor, k: int, error: float) -> None:
    """With what is kept of whole logits; up to a constant a token."""
    expected = TopLogits.of(live, k, (2.0,))
    got, wanted = (each.events(2.0)[mask] for each in (read, expected))
    middles = [each.values[mask].mean(-1, keepdim=True) / 2 for each in (read, expected)]
    assert (got - middles[0] - wanted + middles[1]).abs().max() < error
    assert read.values.shape == (*mask.shape, k)
    assert torch.equal(live.gather(-1, read.ids)[mask], expected.values[mask])


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("codec", CODEC_NAMES)
def test_what_is_read_is_what_the_teacher_says(tmp_path: Path, codec: CodecName, side: str) -> None:
    model = teacher()
    cache = built(tmp_path, model, DATA, SPEC, None, codec, top=TOP)
    few = DATA[3:9]
    shown = cache.read(canonical(few, padded(side)), ASKED)
    mask, live = mask_of(few, side), told(model, few, side)
    assert shown.top_logits is not None and shown.top_logits.vocabulary == 50
    agrees(shown.top_logits, live, mask, 6, ERROR[codec])
    student = torch.randn(live.shape, generator=torch.Generator().manual_seed(0))
    expected = loss_of(student, Signals(top_logits=TopLogits.of(live, 6, (2.0,))), mask)
    assert loss_of(student, shown, mask) == pytest.approx(expected, rel=ERROR[codec] / 2)
    cache.keep_top(2)
    narrow = cache.read(canonical(few, padded(side)), ASKED).top_logits
    assert narrow is not None
    agrees(narrow, live, mask, 2, ERROR[codec])
    assert not verify(tmp_path).problems


def test_more_words_than_16_bits_count(tmp_path: Path) -> None:
    model = tiny_model("gpt2", num_layers=1, head="causal_lm", seed=1, vocab_size=70_000, n_embd=4, n_head=2, n_inner=4)
    cache = built(tmp_path, model, DATA[:4], ASKED, top=TOP)
    shown = cache.read(canonical(DATA[:4]), ASKED).top_logits
    live = told(model, DATA[:4])
    assert shown is not None and int(shown.ids.max()) > 2**16
    agrees(shown, live, mask_of(DATA[:4]), 6, 1e-5)
    # 6 values of 4 bytes, 6 ids of 3, two others of 4
    assert top_facts(cache.manifest.columns) == {"k": 6, "temperatures": [1.0, 2.0], "bytes_a_token": 50}


@pytest.mark.parametrize(("codec", "words", "each"), [("int8", 50_257, 204), ("int8", 151_936, 268), ("float16", 50_257, 264)])
def test_bytes_are_told_before_and_stay_below_300(codec: CodecName, words: int, each: int) -> None:
    sizes = TeacherSizes({"layers": StackSizes(16, 2)}, {"logits": (-1, words)}, ranks=True, top=TopK(64, (1.0, 2.0)))
    assert logits_bytes(codec, sizes) == each


def test_the_price_is_what_the_files_take(tmp_path: Path) -> None:
    cache = built(tmp_path, teacher(), DATA, SPEC, None, "int8", top=TOP)
    sizes = TeacherSizes.of(cache.manifest, cache.stored.selection)
    assert sizes.top == TOP and sizes.logits == {"logits": (-1, 50)}
    lengths = torch.tensor(sorted((len(example["input_ids"]) for example in DATA), reverse=True)).numpy()
    records = Records(lengths, lengths, [slice(0, len(lengths))], planned=True)
    assert FileSizes(records, sizes).total(SPEC, Selection.everything(), "int8") == cache.manifest.bytes
    assert bytes_a_token(cache.manifest.columns) == logits_bytes("int8", sizes) == 6 + 4 + 12 + 8


def test_a_build_that_was_stopped_goes_on_with_as_many(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plans, "SHARD_BYTES", 1500)
    model, whole, stopped = teacher(), tmp_path / "whole", tmp_path / "stopped"
    make = partial(builder, model=model, data=DATA, spec=SPEC, codec="int8")
    make(whole, top=TOP).build()
    with pytest.raises(Stopped):
        make(stopped, top=TOP, source=Stopping(model, stopped, 2)).build()
    with pytest.raises(CacheError, match="top_logits"):
        make(stopped, top=TopK(5, TOP.temperatures)).build()
    make(stopped, top=TOP).build()
    for path in whole.glob("*.safetensors"):
        assert path.read_bytes() == (stopped / path.name).read_bytes()
    assert len(Manifest.load(whole).shards) > 3


@pytest.mark.parametrize("held", [None, TOP])
def test_a_view_has_fewer(tmp_path: Path, held: TopK | None) -> None:
    """Of whole logits, and of the largest; in another number format."""
    model = teacher()
    built(tmp_path / "large", model, DATA, SPEC, None, "float32", top=held)
    copy_view(tmp_path / "large", tmp_path / "small", View(Selection.everything(), "test", "int8", top=TopK(3, (1.0, 2.0))))
    assert not verify(tmp_path / "small").problems
    small, direct = TeacherCache(tmp_path / "small"), built(tmp_path / "direct", model, DATA, SPEC, None, "int8", top=TopK(3, (1.0, 2.0)))
    assert small.top == direct.top and small.manifest.columns == direct.manifest.columns
    shown = small.read(canonical(DATA), SPEC)
    assert shown.top_logits is not None
    agrees(shown.top_logits, told(model, DATA), mask_of(DATA), 3, ERROR["int8"])


def test_examples_that_are_appended_have_as_many(tmp_path: Path) -> None:
    model = teacher()
    cache = built(tmp_path, model, DATA[:12], ASKED, None, "int8", top=TOP)
    run = builder(tmp_path, model, DATA, cache.spec, top=cache.top).run
    missing = MissingExamples(cache, HowToAsk(lambda: run, SPECIAL, 0))
    batch = canonical(DATA)
    before = cache.read_with(batch, ASKED, missing.records(cache, batch)).top_logits
    assert missing.asked == 12 and missing.write()
    after = cache.refreshed().read(batch, ASKED).top_logits
    assert before is not None and after is not None
    assert torch.equal(before.values, after.values) and torch.equal(before.rest[2.0], after.rest[2.0])


def test_what_is_not_stored_is_refused(tmp_path: Path) -> None:
    cache = built(tmp_path / "top", teacher(), DATA[:4], ASKED, top=TOP)
    with pytest.raises(CacheError, match=r"temperature 3,.* holds the 6 largest logits \(all others as one, at T = 1 and 2\)"):
        cache.refuse_absent(SignalSpec(logits=True, temperatures=frozenset({2.0, 3.0})))
    with pytest.raises(CacheError, match="--teacher_cache_logits_top_k 7"):
        cache.keep_top(7)
    whole = built(tmp_path / "whole", teacher(), DATA[:4], ASKED)
    whole.refuse_absent(SignalSpec(logits=True, temperatures=frozenset({3.0})))
    with pytest.raises(CacheError, match="holds whole logits"):
        whole.keep_top(2)
    with pytest.raises(ArgumentError, match="vocabulary has 50 words"):
        TopK.asked_for(50, 50, (2.0,))
