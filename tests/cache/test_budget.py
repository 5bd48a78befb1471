"""A budget in bytes: what is built takes what was said, fits, and loses less the more bytes there are."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from torch import nn

from hf_compress.arguments import CompressionArguments
from hf_compress.cache.budget import TOKENS, possible_tokens, possible_widths
from hf_compress.cache.budget_view import choose_view
from hf_compress.cache.copy_view import View, copy_view
from hf_compress.cache.estimate import TeacherSizes
from hf_compress.cache.file_sizes import FileSizes, Records
from hf_compress.cache.manifest import Manifest
from hf_compress.cache.plan import make_plan
from hf_compress.cache.reader import StoredHow
from hf_compress.cache.select import keeps_whole_states
from hf_compress.cache.selection import Selection
from hf_compress.cache.stack_sizes import StackSizes
from hf_compress.cache.verify import verify
from hf_compress.cli.cache import main as cache_command
from hf_compress.errors import ArgumentError, CacheError
from hf_compress.losses.hidden_states import HiddenStatesLoss
from hf_compress.losses.labels import LabelsLoss
from hf_compress.losses.logits import LogitsLoss
from hf_compress.signals import SignalSpec
from hf_compress.trainer import DistillTrainer
from tests.cache.tiny_caches import SPECIAL, builder, built, pairs, scores, states
from tests.cached_runs import MAP, data, losses, tokenizer
from tests.tiny_models import tiny_model
from tests.tiny_runs import arguments, largest_difference, student, teacher, weights

ROOT = Path(__file__).parents[2]
SIZES = TeacherSizes({"layers": StackSizes(16, 2)}, {"logits": (2,)}, ranks=True)


@pytest.fixture(scope="module")
def guide() -> nn.Module:
    return tiny_model("bert", num_layers=4, seed=1)


# --- bytes, to the byte ---


@pytest.mark.parametrize("codec", ["float32", "int8"])
@pytest.mark.parametrize(
    ("words", "width"), [("all", None), ("3t", None), ("6t_0.4h", "pca"), ("0.4h", "pca"), ("0.4h", "random"), ("6t_0.3h", "magnitude")]
)
def test_a_build_takes_what_was_said(tmp_path: Path, guide: nn.Module, words: str, width: Any, codec: Any) -> None:
    examples = pairs(40)
    for spec in (SignalSpec(logits=True) | states(4), states(0, 2) | scores(2)):
        selection = Selection.parse(words, width_scheme=width)
        folder = tmp_path / str(len(spec.attention_scores))
        building = builder(folder, guide, examples, spec, selection, codec)
        plan = building._plan()
        ids = [examples[place]["input_ids"] for place in plan.order.tolist()]
        # [CLS] may be chosen, the two [SEP] may not.
        choosable = np.array([sum(number not in SPECIAL for number in one) + 1 for one in ids])
        said = FileSizes(Records(plan.lengths, choosable, plan.batches, planned=True), SIZES)
        assert said.least(spec, selection, codec) < said.total(spec, selection, codec) == building.build().bytes
        building.run.source.close()


def test_shards_have_a_header_each(tmp_path: Path, guide: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hf_compress.cache.plan.SHARD_EXAMPLES", 12)
    selection = Selection.parse("3t")
    building = builder(tmp_path / "cache", guide, pairs(40), states(4), selection, "float16")
    plan = building._plan()
    said = FileSizes(Records(plan.lengths, plan.lengths - 2, plan.batches, planned=True), SIZES)
    manifest = building.build()
    assert len(manifest.shards) > 2
    assert said.total(states(4), selection, "float16") == manifest.bytes


# --- what can be chosen ---


def test_numbers_that_are_all_there_are_no_choice() -> None:
    assert possible_tokens(6) == (1, 2, 3, 5, None)
    assert possible_tokens(100, 10) == (1, 2, 3, 5, 7, 10)
    assert possible_tokens(10**6) == (*TOKENS, None)
    assert possible_widths(16) == (0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.7)
    assert [int(width * 16) for width in possible_widths(16)] == [1, 2, 3, 4, 6, 8, 11]
    assert possible_widths(768, 0.1) == (0.02, 0.03, 0.05, 0.07)


@pytest.mark.parametrize(
    ("text", "size"),
    [("200MB", 200_000_000), ("1.5GB", 1_500_000_000), ("500kB", 500_000), ("300000", 300_000), ("2 MiB", 2 * 2**20), (4096, 4096)],
)
def test_a_budget_is_read(text: Any, size: int) -> None:
    assert CompressionArguments(teacher_cache_dir="cache", teacher_cache_budget=text).cache_budget == size


@pytest.mark.parametrize("text", ["200 apples", "-3MB", "MB", "0", "0.1", "1,5GB", "1e9", True])
def test_what_is_no_budget_is_refused(text: Any) -> None:
    with pytest.raises(ArgumentError, match=r"--teacher_cache_budget is .* as in 200MB|write for example 200MB"):
        CompressionArguments(teacher_cache_dir="cache", teacher_cache_budget=text)


def test_flags_that_contradict_a_budget_are_refused(tmp_path: Path) -> None:
    for more in ({"hidden_states_selection": "1l"}, {"hsk_length": "left_first"}, {"teacher_cache_layers": "all"}):
        with pytest.raises(ArgumentError, match=f"--teacher_cache_budget chooses what is kept, and --{next(iter(more))} says it"):
            CompressionArguments(teacher_cache_dir="cache", teacher_cache_budget="1MB", **more)
    with pytest.raises(ArgumentError, match="--teacher_cache_budget is about a teacher on disk: add --teacher_cache_dir"):
        CompressionArguments(teacher_cache_budget="1MB")
    file = tmp_path / "flags.json"
    file.write_text('{"teacher_cache_dir": "cache", "teacher_cache_budget": "1kB"}')
    assert CompressionArguments(hf_compress_config=str(file)).cache_budget == 1000


# --- a run ---


def run(folder: Path, budget: str | None, guide: nn.Module | None = None, **more: Any) -> DistillTrainer:
    """A run of three steps; its teacher is another one than the fixture's, as a run may freeze it."""
    flags = {name: more.pop(name) for name in [*more] if name.startswith(("hidden_states", "teacher_", "distill"))}
    trainer = DistillTrainer(
        student(),
        arguments(folder / "out", max_steps=3, per_device_train_batch_size=4),
        teacher=guide,
        losses=more.pop("losses", None) if "distill_recipe" in flags else more.pop("losses", None) or losses()[:2],
        compression=CompressionArguments(teacher_cache_dir=str(folder / "cache"), teacher_cache_budget=budget, **flags),
        train_dataset=data(),
        processing_class=tokenizer(),
        **more,
    )
    trainer.train()
    return trainer


def test_a_run_within_a_budget(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    found = []
    for budget in (3000, 4000, 6000, 9000, 100_000):
        caplog.clear()
        with caplog.at_level(logging.INFO, "hf_compress"):
            trainer = run(tmp_path / str(budget), str(budget), teacher())
        manifest = Manifest.load(tmp_path / str(budget) / "cache")
        how = StoredHow.of(manifest)
        assert manifest.bytes <= budget
        assert manifest.distillation["selected"] is True
        assert manifest.distillation["budget"].keys() == {"bytes", "lost"} and manifest.distillation["budget"]["bytes"] == budget
        assert f"--hsk {how.selection.describe()}, {how.codec}, takes" in caplog.text
        assert not verify(tmp_path / str(budget) / "cache").problems
        found.append((manifest.distillation["budget"]["lost"], how, trainer))
    lost = [each for each, _, _ in found]
    assert lost == sorted(lost, reverse=True) and len(set(lost)) >= 4 and lost[-1] < 1e-5
    everything = found[-1][1]
    assert str(everything.selection) == "all" and everything.codec == "float16"
    assert found[0][1].selection != everything.selection
    start = {name: parameter.detach().clone() for name, parameter in student().named_parameters()}
    assert all(largest_difference(weights(trainer), start) > 1e-3 for _, _, trainer in found)


def test_a_budget_trains_as_the_selection_that_it_chose(tmp_path: Path) -> None:
    chosen = run(tmp_path / "budget", "4kB", teacher())
    manifest = Manifest.load(tmp_path / "budget" / "cache")
    how = StoredHow.of(manifest)
    assert str(how.selection) != "all"
    given = run(tmp_path / "given", None, teacher(), hidden_states_selection=str(how.selection), teacher_cache_dtype=how.codec)
    other = Manifest.load(tmp_path / "given" / "cache")
    assert (manifest.bytes, manifest.shards, manifest.selection) == (other.bytes, other.shards, other.selection)
    assert largest_difference(weights(chosen), weights(given)) == 0.0


def test_a_later_run_reads_what_is_there(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    first = run(tmp_path, "4kB", teacher())
    before = Manifest.load(tmp_path / "cache")
    with caplog.at_level(logging.INFO, "hf_compress"):
        again = run(tmp_path, "3kB")
    assert Manifest.load(tmp_path / "cache") == before
    assert "--teacher_cache_budget counts when a teacher on disk is built, and this one is there" in caplog.text
    assert "more than 3.0 kB" in caplog.text
    assert largest_difference(weights(first), weights(again)) == 0.0


def test_a_build_that_was_stopped_goes_on_with_its_choice(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr("hf_compress.cache.build.write_index", lambda *args: (_ for _ in ()).throw(KeyboardInterrupt()))
        with pytest.raises(KeyboardInterrupt):
            run(tmp_path, "4kB", teacher())
    with pytest.raises(CacheError, match="with other settings"):
        run(tmp_path, "4kB", teacher(), teacher_cache_dtype="bfloat16")
    caplog.clear()
    with caplog.at_level(logging.INFO, "hf_compress"):
        run(tmp_path, "4kB", teacher())
    assert "going on with what was chosen" in caplog.text and "measuring" not in caplog.text
    assert Manifest.load(tmp_path / "cache").bytes <= 4000


def test_too_little_is_refused_before_work(tmp_path: Path) -> None:
    with pytest.raises(ArgumentError, match=r"is 500 bytes, and the least .* 1l_1t_0.1h as float16, takes ([\d,]+) bytes") as caught:
        run(tmp_path, "500", teacher())
    assert "--distill_recipe logits: " in str(caught.value)
    needed = int(str(caught.value).split(" takes ")[1].split(" bytes")[0].replace(",", ""))
    with pytest.raises(ArgumentError, match=f"takes {needed:,} bytes"):
        run(tmp_path, str(needed - 1), teacher())
    run(tmp_path, str(needed), teacher())
    assert Manifest.load(tmp_path / "cache").bytes == needed
    # ... and so many do for the logits.
    alone = int(str(caught.value).split("logits: ")[1].split(" bytes")[0].replace(",", ""))
    run(tmp_path / "alone", None, teacher(), distill_recipe="logits")
    assert Manifest.load(tmp_path / "alone" / "cache").bytes == alone


def test_nothing_to_choose_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ArgumentError, match="no loss compares hidden states"):
        run(tmp_path, "4kB", teacher(), losses=[LogitsLoss(), LabelsLoss()])


def test_losses_of_whole_states_get_whole_states(tmp_path: Path) -> None:
    run(tmp_path, "8kB", teacher(), losses=[LogitsLoss(), HiddenStatesLoss(MAP, kind="cosine")])
    assert keeps_whole_states(StoredHow.of(Manifest.load(tmp_path / "cache")).selection)


def test_a_number_format_that_is_given_is_kept(tmp_path: Path) -> None:
    run(tmp_path, "100kB", teacher(), teacher_cache_dtype="bfloat16")
    assert StoredHow.of(Manifest.load(tmp_path / "cache")).codec == "bfloat16"


# --- views ---


@pytest.mark.parametrize(
    ("words", "width", "codec"),
    [
        ("all", None, "float32"),
        ("8t_0.5h", None, "float16"),
        ("0.5h", "random", "bfloat16"),
        ("6t_0.5h", "magnitude", "float32"),
        ("all", None, "int8"),
    ],
)
def test_a_view_within_a_budget(tmp_path: Path, guide: nn.Module, words: str, width: Any, codec: Any) -> None:
    spec = SignalSpec(logits=True) | states(2, 4) | scores(4)
    selection = Selection.parse(words, width_scheme=width)
    larger = built(tmp_path / "larger", guide, pairs(40), spec, selection, codec).manifest
    alone = copy_view(tmp_path / "larger", tmp_path / "alone", View(selection, "test", attention_scores=False)).bytes
    lost = []
    for share, attention in product((0.5, 0.8, 1.0), (False, True)):
        budget = larger.bytes - int(0.8 * (1 - share) * alone) if attention else int(share * alone)
        choices = choose_view(tmp_path / "larger", budget, None, attention_scores=attention, in_parts=True)
        chosen = choices.best.chosen
        view = View(chosen.selection, "test", chosen.codec, attention_scores=attention)
        manifest = copy_view(tmp_path / "larger", tmp_path / f"{share}{attention}", view)
        assert manifest.bytes == choices.best.bytes <= budget
        assert not verify(tmp_path / f"{share}{attention}").problems
        assert str(choices.best) and len(choices.lines()) >= 1
        if not attention:
            lost.append(chosen.lost)
    assert lost == sorted(lost, reverse=True) and lost[0] > lost[-1]
    assert lost[-1] < 0.01


def test_a_view_of_too_little_or_of_nothing_is_refused(tmp_path: Path, guide: nn.Module) -> None:
    built(tmp_path / "larger", guide, pairs(40), SignalSpec(logits=True) | states(4))
    with pytest.raises(ArgumentError, match="the least that keeps any hidden states"):
        choose_view(tmp_path / "larger", 100, None, attention_scores=True, in_parts=True)
    built(tmp_path / "logits", guide, pairs(40), SignalSpec(logits=True))
    with pytest.raises(CacheError, match="holds no hidden states"):
        choose_view(tmp_path / "logits", 10**6, None, attention_scores=True, in_parts=True)


def test_a_view_says_nothing_of_the_larger_ones_budget(tmp_path: Path, guide: nn.Module) -> None:
    built(tmp_path / "larger", guide, pairs(40), states(2, 4), distillation={"budget": {"bytes": 1, "lost": 0.5}})
    assert "budget" not in copy_view(tmp_path / "larger", tmp_path / "smaller", View(Selection.parse("1l"), "test")).distillation


def test_the_plan_of_the_sizes_is_that_of_the_build() -> None:
    keys = np.arange(20, dtype=np.uint64).reshape(10, 2)
    lengths = np.array([5, 3, 9, 9, 2, 7, 7, 1, 4, 6])
    plan = make_plan(keys, lengths, batch_tokens=18, example_bytes=lambda length: 10.0**8 * (length > 4))
    assert plan.shards == (slice(0, 1), slice(1, 2), slice(2, 3), slice(3, len(plan.batches)))


def test_the_command(tmp_path: Path, guide: nn.Module, capsys: pytest.CaptureFixture[str]) -> None:
    larger, smaller = tmp_path / "larger", tmp_path / "smaller"
    built(larger, guide, pairs(40), SignalSpec(logits=True) | states(2, 4) | scores(4))
    assert cache_command(["view", str(larger), "-o", str(smaller), "--teacher_cache_budget", "8kB"]) == 0
    manifest = Manifest.load(smaller)
    assert manifest.bytes <= 8000
    assert not any(column.name.startswith("attention_scores") for column in manifest.columns)  # no recipe asks for them by name
    said = capsys.readouterr().out
    assert "8.0 kB for the teacher on disk: --hsk" in said and "for half of it: --hsk" in said
    with pytest.raises(ArgumentError, match="--teacher_cache_budget chooses what is kept"):
        cache_command(["view", str(larger), "-o", str(tmp_path / "no"), "--teacher_cache_budget", "8kB", "--hsk", "1l"])
    with pytest.raises(ArgumentError, match="or how large it may be with --teacher_cache_budget"):
        cache_command(["view", str(larger), "-o", str(tmp_path / "no")])


# --- two processes ---

SCRIPT = """
import os, sys
from pathlib import Path
import torch
from tests.cache.test_budget import run
from tests.tiny_runs import teacher

torch.set_num_threads(1)
try:
    run(Path(sys.argv[1]), sys.argv[2], teacher())
    code = 0
except Exception as error:
    print(type(error).__name__, error, file=sys.stderr)
    code = 3
sys.stderr.flush()
os._exit(code)  # without Python's shutdown, in which a gloo thread may abort the process
"""


@pytest.mark.slow
def test_two_processes_choose_the_same(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)

    def launched(folder: Path, budget: str) -> subprocess.CompletedProcess[str]:
        launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
        return subprocess.run(
            [sys.executable, *launcher, str(script), str(folder), budget],
            env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
            capture_output=True,
            text=True,
            timeout=300,
        )

    done = launched(tmp_path / "two", "4kB")
    assert done.returncode == 0, done.stderr[-3000:]
    run(tmp_path / "one", "4kB", teacher())
    two, one = Manifest.load(tmp_path / "two" / "cache"), Manifest.load(tmp_path / "one" / "cache")
    assert (two.selection, two.distillation, two.bytes, two.shards) == (one.selection, one.distillation, one.bytes, one.shards)
    refused = launched(tmp_path / "refused", "500")
    assert refused.returncode != 0 and "is 500 bytes, and the least" in refused.stderr
