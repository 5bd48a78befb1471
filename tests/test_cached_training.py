"""Training from a teacher on disk is training from the teacher. The live side is `cached_runs.Plain`, a plain loop, no trainer of ours."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from torch import Tensor, nn

from hf_compress.arguments import CompressionArguments
from hf_compress.cache.selection import Selection
from hf_compress.losses.hidden_states import HiddenStatesLoss
from hf_compress.losses.labels import LabelsLoss
from hf_compress.losses.logits import LogitsLoss
from hf_compress.trainer import DistillTrainer
from tests.cache.tiny_caches import Told, basis_by_hand, bert_scores, pairs, tokens_by_hand
from tests.cached_runs import (
    MAP,
    RATE,
    Plain,
    StatesError,
    agree,
    cached,
    data,
    losses,
    tokenizer,
    whats_in,
)
from tests.tiny_models import tiny_model
from tests.tiny_runs import NARROW, arguments, largest_difference, student, teacher, weights

ROOT = Path(__file__).parents[1]

PUPILS: dict[str, Callable[[], Any]] = {"bert": student, "distilbert": lambda: tiny_model("distilbert", num_layers=2, seed=2)}


@pytest.mark.parametrize(
    ("pupil", "dataset", "options"),
    [
        ("bert", data(), {}),
        ("bert", data(padded_to=24), {}),
        ("bert", data(), {"gradient_accumulation_steps": 2, "per_device_train_batch_size": 2}),
        ("bert", data(), {"dataloader_num_workers": 2, "dataloader_persistent_workers": True}),
        ("bert", data(), {"tokenizer": tokenizer(padding_side="left")}),
        ("distilbert", data(), {}),
    ],
    ids=["dynamic padding", "padding=max_length", "accumulation", "two workers", "padded on the left", "distilbert"],
)
def test_cached_equals_live(tmp_path: Path, pupil: str, dataset: Dataset, options: dict[str, Any]) -> None:
    model = PUPILS[pupil]()
    start = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    guide = teacher()
    if "tokenizer" in options:
        # A student whose padding is on the left reads other positions: BERT's own follow the row, not the mask.
        for network in (model, guide):
            network.bert.embeddings.position_embeddings.weight.data.zero_()
        start = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    trainer = cached(tmp_path, model, guide, dataset=dataset, **options)
    order = [example for step in range(50) for example in whats_in(trainer.steps[step])]
    assert sorted(order[:16]) == sorted(order[16:32]) and order[:16] != order[16:32]  # shuffled, and anew
    starts = [bool(batch["attention_mask"][:, 0].all()) for batches in trainer.steps.values() for batch in batches]
    assert all(starts) == ("tokenizer" not in options)
    pupil_again = PUPILS[pupil]()
    pupil_again.load_state_dict(start, strict=False)
    agree(trainer, Plain(pupil_again, guide), start)


def test_a_later_run_without_the_teacher_is_the_same_run(tmp_path: Path) -> None:
    first = cached(tmp_path, student(), teacher())
    second = cached(tmp_path, student(), None)
    assert first.values == second.values and len(second.values) == 50
    assert largest_difference(weights(first), weights(second)) == 0.0


def test_dropout_falls_as_in_a_live_run(tmp_path: Path) -> None:
    """Building and reading draw no random numbers that the student's dropout would then not get."""

    def pupil() -> nn.Module:
        return student(hidden_dropout_prob=0.3)

    def live() -> dict[str, Tensor]:
        settings = arguments(tmp_path / "live", max_steps=6, per_device_train_batch_size=4, learning_rate=RATE)
        torch.manual_seed(5)
        trainer = DistillTrainer(pupil(), settings, teacher=teacher(), losses=losses(), train_dataset=data(), processing_class=tokenizer())
        trainer.train()
        return weights(trainer)

    expected = live()
    built = cached(tmp_path, pupil(), teacher(), max_steps=6)
    read = cached(tmp_path, pupil(), None, max_steps=6)
    assert largest_difference(weights(built), expected) < 1e-6
    assert largest_difference(weights(read), expected) < 1e-6


@pytest.mark.parametrize("workers", [0, pytest.param(2, marks=pytest.mark.slow)])
def test_a_run_that_is_resumed_in_the_middle(tmp_path: Path, workers: int) -> None:
    guide = teacher()
    whole = cached(tmp_path, student(), guide, save_strategy="steps", save_steps=22)
    start = {name: parameter.detach().clone() for name, parameter in student().named_parameters()}
    checkpoint = str(tmp_path / "out" / "checkpoint-22")
    other = tiny_model("bert", num_layers=2, seed=8)
    resumed = cached(tmp_path, other, None, resume=checkpoint, dataloader_num_workers=workers)
    assert sorted(resumed.steps) == list(range(22, 50))
    for step in resumed.steps:
        assert whats_in(resumed.steps[step]) == whats_in(whole.steps[step])
    plain = Plain(student(), guide)
    live = plain.follow(whole.steps)
    assert [resumed.values[step] for step in range(22, 50)] == pytest.approx(live[22:], abs=1e-6, rel=1e-6)
    assert largest_difference(weights(resumed), plain.weights()) < 1e-6
    assert largest_difference(weights(resumed), start) > 1e-2


def live_and_cached(folder: Path, **options: Any) -> tuple[DistillTrainer, DistillTrainer]:
    """Two trainers in which only `--teacher_cache_dir` differs; here the live side is DistillTrainer's own."""
    trainers = []
    phases = options.pop("distill_phases", None)
    for name in ("live", "cached"):
        cache = {"teacher_cache_dir": str(folder / "cache"), "teacher_cache_dtype": "float32"} if name == "cached" else {}
        settings = {"max_steps": 4, "per_device_train_batch_size": 4, "learning_rate": RATE, **options.get("settings", {})}
        given = {"model": student(), **{key: value for key, value in options.items() if key != "settings"}}
        trainer = DistillTrainer(
            args=arguments(folder / name, **settings),
            teacher=teacher(),
            losses=losses(),
            compression=CompressionArguments(distill_phases=phases, **cache),
            train_dataset=data(),
            processing_class=tokenizer(),
            **given,
        )
        trainer.train()
        trainers.append(trainer)
    return trainers[0], trainers[1]


def test_phases_read_what_each_of_them_needs(tmp_path: Path) -> None:
    phases = "intermediate=2,prediction=1"
    live, cached_ = live_and_cached(tmp_path, distill_phases=phases, settings={"max_steps": -1, "save_strategy": "epoch"})
    assert largest_difference(weights(live), weights(cached_)) < 1e-6
    logged = [{name for name in entry if name.startswith("loss_")} for entry in cached_.state.log_history if "loss" in entry]
    assert logged == [{"loss_hidden_states", "loss_attention_scores"}] * 8 + [{"loss_logits", "loss_labels"}] * 4


def test_a_model_that_model_init_makes(tmp_path: Path) -> None:
    live, cached_ = live_and_cached(tmp_path, model=None, model_init=lambda: student())
    assert largest_difference(weights(live), weights(cached_)) < 1e-6
    assert largest_difference(weights(cached_), dict(student().named_parameters())) > 1e-3


def test_evaluation_is_the_tasks_own_and_training_may_go_on(tmp_path: Path) -> None:
    live, cached_ = live_and_cached(tmp_path, eval_dataset=data(), settings={"eval_strategy": "steps", "eval_steps": 2})
    found, expected = ([entry["eval_loss"] for entry in run.state.log_history if "eval_loss" in entry] for run in (cached_, live))
    assert len(found) == 2 and found == pytest.approx(expected, abs=1e-6)
    assert cached_.predict(data()).predictions == pytest.approx(live.predict(data()).predictions, abs=1e-5)
    for run in (live, cached_):
        run.train()
    assert largest_difference(weights(live), weights(cached_)) < 1e-6


# --- part of the hidden states ---


def by_hand(guide: Any, selection: Selection) -> StatesError:
    """The error of layer 2 against the teacher's layer 4 at the selected tokens, in the selected dimensions."""
    hidden = 16
    _, directions = basis_by_hand(guide, pairs(16, seed=3), selection, 4, int(selection.width * hidden))

    def error(ids: list[int], types: list[int], mine: Sequence[Tensor]) -> tuple[Tensor, int]:
        example = {"input_ids": ids, "token_type_ids": types}
        told = Told(guide, example)
        tokens = tokens_by_hand(told, selection, bert_scores(guide, example, 4), 4)
        ours, theirs = mine[2][tokens], told.states[4][tokens]
        if selection.width_scheme == "pca":
            return ((ours - theirs) @ directions).square().sum() / hidden, len(tokens)
        sizes = theirs.abs().flatten().sort(descending=True).values
        large = theirs.abs() >= sizes[int(selection.width * len(sizes)) - 1]
        if selection.mask == "zero_target":
            return (ours - theirs * large).square().sum() / hidden, len(tokens)
        return ((ours - theirs) * large).square().sum() / (selection.width * hidden), len(tokens)

    return error


@pytest.mark.parametrize(
    ("width", "mask", "accumulation"), [("pca", "ignore", 2), ("magnitude", "ignore", 1), ("magnitude", "zero_target", 2)]
)
def test_a_selection_is_taught_as_a_plain_loop_does(tmp_path: Path, width: Any, mask: Any, accumulation: int) -> None:
    guide = teacher()
    selection = Selection.parse("1l_3t_0.5h", width_scheme=width, mask=mask)
    trainer = cached(
        tmp_path,
        student(),
        guide,
        losses=[LogitsLoss(), HiddenStatesLoss(MAP, weight=2.0), LabelsLoss(weight=0.5)],
        hidden_states_selection="1l_3t_0.5h",
        hsk_width=width,
        hsk_mask=mask,
        max_steps=10,
        per_device_train_batch_size=8 // accumulation,
        gradient_accumulation_steps=accumulation,
    )
    start = {name: parameter.detach().clone() for name, parameter in student().named_parameters()}
    agree(trainer, Plain(student(), guide, by_hand(guide, selection)), start, steps=10)


@pytest.mark.parametrize(("words", "width"), [("1l_6t_0.5h", "pca"), ("0.5h", "magnitude"), ("2l_10t", "random")])
def test_accumulated_micro_batches_of_selections_give_the_gradient_of_one_batch(tmp_path: Path, words: str, width: str) -> None:
    """Through a projection; lengths differ five times, so that micro-batches have other numbers of selected tokens."""
    chosen = {"hidden_states_selection": words, **({"hsk_width": width} if "h" in words else {})}
    ends = []
    for micro_batches in (1, 2):
        trainer = cached(
            tmp_path / str(micro_batches),
            student(**NARROW),
            teacher(),
            losses=[LogitsLoss(), HiddenStatesLoss(MAP)],
            max_steps=1,
            per_device_train_batch_size=16 // micro_batches,
            gradient_accumulation_steps=micro_batches,
            learning_rate=0.1,
            **chosen,
        )
        assert len(trainer.steps[0]) == micro_batches
        ends.append((weights(trainer), trainer.state.log_history[0]))
    for other, log in ends[1:]:
        assert largest_difference(ends[0][0], other) < 1e-6
        assert log["loss_hidden_states"] == pytest.approx(ends[0][1]["loss_hidden_states"], rel=1e-4)
    assert ends[0][1]["loss_hidden_states"] > 0.01
