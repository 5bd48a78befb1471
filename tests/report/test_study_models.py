"""What a study reads off configs and off a finished teacher on disk; shares and bytes against what is really stored."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from hf_compress.arguments import CompressionArguments
from hf_compress.cache.copy_view import View, copy_view
from hf_compress.cache.manifest import Manifest
from hf_compress.cache.selection import Depth, Selection
from hf_compress.errors import ArgumentError, CacheError, TeacherError
from hf_compress.report.study_arms import PARTS, Arm, Choices, planned_arms
from hf_compress.report.study_models import Models, Stored, refuse_arms
from hf_compress.signals import SignalSpec
from tests.cache.tiny_caches import SPECIAL, builder, pairs, states
from tests.tiny_models import tiny_model

DATA = pairs(30, seed=4)
LENGTHS = [len(example["input_ids"]) for example in DATA]
# The first token sums the example up, and is a word like others.
WORDS = [sum(token not in SPECIAL for token in example["input_ids"]) + 1 for example in DATA]


def flags(**more: Any) -> CompressionArguments:
    return CompressionArguments(**{"distill_recipe": "mud", "teacher_cache_dir": "cache", **more})


def saved(folder: Path, layers: int, head: str = "sequence_classification") -> str:
    model = tiny_model("bert", num_layers=layers, head=head)
    model.config.architectures = [type(model).__name__]
    model.config.save_pretrained(folder)
    return str(folder)


def cache(folder: Path, *layers: int, selection: Selection | None = None, distillation: dict[str, Any] | None = None) -> Manifest:
    spec = SignalSpec(logits=True) | states(*layers)
    known = {"distill_recipe": "mud"} if distillation is None else distillation
    building = builder(folder, tiny_model("bert", num_layers=4, seed=1), DATA, spec, selection, "float16", distillation=known)
    manifest = building.build()
    building.run.source.close()
    return manifest


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("whole") / "cache"
    cache(folder, 0, 1, 2, 3, 4)
    return folder


def test_depths_and_the_runs_own_pairs(tmp_path: Path) -> None:
    teacher, student = saved(tmp_path / "teacher", 12), saved(tmp_path / "student", 4, "masked_lm")  # a script gives it a head
    models = Models.read(flags(teacher_model_name_or_path=teacher), student, None)
    assert (models.layers.student, models.layers.teacher, models.layers.own) == (4, 12, ((1, 3), (2, 6), (3, 9), (4, 12)))
    arms = planned_arms(Choices(parts=PARTS), models.layers)
    assert models.stored_layers(arms) == {0, 2, 3, 4, 5, 6, 8, 9, 10, 12}  # all schemes of the paper, M = 4
    own = Models.read(flags(teacher_model_name_or_path=teacher, distill_layer_map="1:2,4:11"), student, None)
    assert own.layers.own == ((1, 2), (4, 11))
    dropped = Models.read(flags(teacher_model_name_or_path=teacher, layers_to_keep="1,6,12"), saved(tmp_path / "same", 12), None)
    assert (dropped.layers.student, dropped.layers.own) == (3, ((1, 1), (2, 6), (3, 12)))


@pytest.mark.parametrize("recipe", [None, "layerwise"])
def test_a_cache_of_the_default_recipe_lends_its_map_to_who_names_that_recipe(tmp_path: Path, recipe: str | None) -> None:
    manifest = cache(tmp_path / "cache", 1, 4, distillation={"distill_layer_map": "1:1,2:4"})
    models = Models.read(flags(distill_recipe=recipe), saved(tmp_path / "student", 2), manifest)
    assert models.layers.own == ((1, 1), (2, 4))  # a uniform map is another
    other = Models.read(flags(distill_recipe="mud", distill_layer_map="2:4"), saved(tmp_path / "student", 2), manifest)
    assert other.layers.own == ((2, 4),)


@pytest.mark.parametrize(
    ("more", "error", "words"),
    [
        ({"distill_recipe": "logits"}, ArgumentError, "logits compares no hidden states"),
        ({"distill_recipe": "pkd"}, ArgumentError, "needs them whole"),
        ({"distill_weights": "logits=0"}, ArgumentError, "leave the logits a weight"),
        ({"layer_drop_strategy": "contribution"}, ArgumentError, "measures which layers to drop when a run begins"),
        ({"teacher_model_name_or_path": None}, TeacherError, "no finished teacher on disk in cache, and no teacher to build it from"),
        ({"teacher_model_name_or_path": "no/such"}, TeacherError, "There is no model in no/such"),
    ],
)
def test_what_cannot_be_studied(tmp_path: Path, more: dict[str, Any], error: type[Exception], words: str) -> None:
    given = {"teacher_model_name_or_path": saved(tmp_path / "teacher", 4), **more}
    with pytest.raises(error, match=words):
        Models.read(flags(**given), saved(tmp_path / "student", 2), None)


def test_a_finished_cache_says_which_arms_it_cannot_be_read_as(tmp_path: Path, whole: Path) -> None:
    manifest = Manifest.load(whole)
    models = Models.read(flags(), saved(tmp_path / "student", 2), manifest)
    assert models.layers.own == ((1, 2), (2, 4))
    refuse_arms(whole, manifest, planned_arms(Choices(parts=PARTS), models.layers), models.layers)

    own = cache(tmp_path / "own", 2, 4)
    arms = planned_arms(Choices(parts=("ends", "depth", "joint"), schemes=("own", "t_top8")), models.layers)
    with pytest.raises(CacheError) as refused:
        refuse_arms(tmp_path / "own", own, arms, models.layers)
    assert "1l-t_top8, 2l-t_top8: it does not hold teacher layer 3; it holds 2, 4" in str(refused.value)
    assert "1l_10t_0.1h" not in str(refused.value) and "1l-own" not in str(refused.value)

    little = cache(tmp_path / "little", 4, selection=Selection(Depth(1), 5, "attention_no_sep", width=0.5, width_scheme="pca"))
    fitting = Arm("1l_5t_0.1h", "joint", "joint", Selection(Depth(1), 5, "attention_no_sep", width=0.1, width_scheme="pca"))
    refuse_arms(tmp_path / "little", little, [fitting, Arm("none", "ends", "", None)], models.layers)
    with pytest.raises(CacheError, match="all: it holds 5 tokens an example, not all"):
        refuse_arms(tmp_path / "little", little, [Arm("all", "ends", "", Selection.everything())], models.layers)
    ranked = Arm("5t-attention-scores", "length", "attention", Selection(tokens=5, length="attention", rank_by="scores"))
    with pytest.raises(CacheError, match="not their scores"):
        refuse_arms(whole, manifest, [ranked], models.layers)


TINY = tiny_model("bert", num_layers=1).config.hidden_size


@pytest.mark.parametrize(
    ("selection", "numbers"),
    [
        (Selection.everything(), 2 * sum(LENGTHS) * TINY),
        (Selection(Depth(1)), sum(LENGTHS) * TINY),
        (Selection(tokens=6, length="attention"), 2 * sum(min(6, length) for length in LENGTHS) * TINY),
        (Selection(tokens=6, length="attention_no_sep"), 2 * sum(min(6, words) for words in WORDS) * TINY),
        (Selection(width=0.3, width_scheme="random"), 2 * sum(LENGTHS) * int(0.3 * TINY)),
        (Selection(width=0.3, width_scheme="magnitude"), 2 * sum(int(0.3 * length * TINY) for length in LENGTHS)),
        (Selection(Depth(1), 5, "left_first", width=0.2, width_scheme="pca"), sum(min(5, length) for length in LENGTHS) * int(0.2 * TINY)),
    ],
    ids=str,
)
def test_shares_are_counted_and_bytes_are_those_of_such_a_cache(tmp_path: Path, whole: Path, selection: Selection, numbers: int) -> None:
    """Of all numbers that there are: a student of 2 layers has 3 places."""
    stored, models = Stored.read(whole), Models.read(flags(), saved(tmp_path / "student", 2), Manifest.load(whole))
    own = models.layers.pairs(selection)
    assert stored.share(selection, own, 2) == pytest.approx(numbers / (3 * sum(LENGTHS) * TINY))
    assert stored.exact and sorted(stored.lengths.tolist()) == sorted(LENGTHS) and sorted(stored.words.tolist()) == sorted(WORDS)
    # A view of just the layers that the arm reads is such a cache; headers are some kilobytes.
    layers = tuple((number, teacher) for number, (_, teacher) in enumerate(own, start=1))
    asked = Selection(Depth(pairs=layers), selection.tokens, selection.length, width=selection.width, width_scheme=selection.width_scheme)
    view = copy_view(whole, tmp_path / "view", View(asked, "test"))
    overhead = 4096 + 8 + sum(path.stat().st_size for path in (tmp_path / "view").glob("shared*")) // 2 + 1024
    found = stored.bytes_an_example(models, selection) * view.examples
    least = 0 if selection.length != "attention_no_sep" else 6 * TINY * 2 * 2 * view.examples  # priced as if all tokens were words
    assert view.bytes - overhead <= found <= view.bytes + least


def test_the_predictions_alone(tmp_path: Path, whole: Path) -> None:
    stored, models = Stored.read(whole), Models.read(flags(), saved(tmp_path / "student", 2), Manifest.load(whole))
    assert stored.share(None, (), 2) == 0
    assert stored.bytes_an_example(models, None) == 48 + 4 * 2  # key, checksum, index; two logits


def test_a_cache_of_some_tokens_counts_with_the_mean(tmp_path: Path) -> None:
    cache(tmp_path / "cache", 4, selection=Selection(tokens=4, length="attention"))
    stored = Stored.read(tmp_path / "cache")
    assert not stored.exact and set(stored.lengths.tolist()) == {round(sum(LENGTHS) / len(LENGTHS))}
