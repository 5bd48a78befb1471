"""Training from a teacher on disk is training from the teacher: the live side is a plain loop written here, not the trainer's own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from datasets import Dataset
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from torch import Tensor, nn
from transformers import PreTrainedTokenizerFast

from hf_compress.arguments import CompressionArguments
from hf_compress.cache.selection import Selection
from hf_compress.layers.layer_map import LayerMap
from hf_compress.losses.attention_scores import AttentionScoresLoss
from hf_compress.losses.hidden_states import HiddenStatesLoss
from hf_compress.losses.labels import LabelsLoss
from hf_compress.losses.logits import LogitsLoss
from hf_compress.losses.loss import Loss
from hf_compress.trainer import DistillTrainer
from tests.cache.tiny_caches import Told, basis_by_hand, bert_scores, pairs, tokens_by_hand
from tests.test_distill_trainer import NARROW, arguments, largest_difference, student, teacher, weights
from tests.tiny_models import tiny_model

ROOT = Path(__file__).parents[1]
MAP = LayerMap(((1, 2), (2, 4)))
RATE = 0.02
Batch = dict[str, Tensor]


def data(padded_to: int | None = None) -> Dataset:
    """16 pairs of sentences; lengths differ five times."""
    examples: list[dict[str, Any]] = []
    for number, example in enumerate(pairs(16, seed=3)):
        padding = [0] * ((padded_to or 0) - len(example["input_ids"]))
        columns = {**example, "attention_mask": [1] * len(example["input_ids"])}
        examples.append({**{name: values + padding for name, values in columns.items()}, "label": number % 2})
    return Dataset.from_list(examples)


def tokenizer(**options: Any) -> PreTrainedTokenizerFast:
    words = ["[PAD]", "[CLS]", "[SEP]", "[UNK]", *(f"w{number}" for number in range(4, 50))]
    vocabulary = Tokenizer(WordLevel({word: index for index, word in enumerate(words)}, unk_token="[UNK]"))
    special = {"pad_token": "[PAD]", "cls_token": "[CLS]", "sep_token": "[SEP]", "unk_token": "[UNK]"}
    return PreTrainedTokenizerFast(tokenizer_object=vocabulary, **special, **options)


def losses() -> list[Loss]:
    return [LogitsLoss(), HiddenStatesLoss(MAP, weight=2.0), AttentionScoresLoss(MAP), LabelsLoss(weight=0.5)]


class Recording(DistillTrainer):
    """Notes what each forward of training saw, and what its loss was."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.steps: dict[int, list[Batch]] = {}
        self.values: dict[int, float] = {}
        super().__init__(*args, **kwargs)

    def compute_loss(self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None) -> Any:
        loss = super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        step = self.state.global_step
        self.steps.setdefault(step, []).append({name: value.clone() for name, value in inputs.items() if isinstance(value, Tensor)})
        self.values[step] = self.values.get(step, 0.0) + float(loss.detach()) / self._micro_batches() / self.accelerator.num_processes
        return loss


def cached(
    folder: Path, model: nn.Module, guide: nn.Module | None, *, dataset: Dataset | None = None, resume: str | None = None, **more: Any
) -> Recording:
    """Train from a cache in `folder`, built first where there is a teacher."""
    chosen = more.pop("losses", None) or losses()
    known = more.pop("tokenizer", None) or tokenizer()
    # A later run takes the selection from the cache.
    selected = {name: more.pop(name) for name in [*more] if name.startswith(("hsk", "hidden_states"))} if guide is not None else {}
    flags = CompressionArguments(
        teacher_cache_dir=str(folder / "cache"), **({"teacher_cache_dtype": "float32"} if guide is not None else {}), **selected
    )
    settings = {"max_steps": 50, "per_device_train_batch_size": 4, "learning_rate": RATE, **more}
    torch.manual_seed(5)  # projections are random
    trainer = Recording(
        model,
        arguments(folder / "out", **settings),
        teacher=guide,
        losses=chosen,
        compression=flags,
        train_dataset=data() if dataset is None else dataset,
        processing_class=known,
    )
    trainer.train(resume_from_checkpoint=resume)
    return trainer


# --- the live side ---


def shown(model: Any, inputs: Batch) -> tuple[Tensor, Sequence[Tensor], list[Tensor]]:
    """Logits, hidden states, and scores QK^T/sqrt(d) of each layer, (batch, heads, tokens, tokens), of a BERT or a DistilBERT."""
    bert = hasattr(model, "bert")
    layers = model.bert.encoder.layer if bert else model.distilbert.transformer.layer
    parts = [
        (layer.attention.self.query, layer.attention.self.key) if bert else (layer.attention.q_lin, layer.attention.k_lin)
        for layer in layers
    ]
    seen: dict[nn.Module, Tensor] = {}
    hooks = [part.register_forward_hook(lambda module, args, output: seen.update({module: output})) for pair in parts for part in pair]
    known = {"input_ids", "attention_mask", "token_type_ids"} if bert else {"input_ids", "attention_mask"}
    outputs = model(**{name: inputs[name] for name in known}, output_hidden_states=True)
    for hook in hooks:
        hook.remove()
    scores = []
    for query, key in (
        (seen[query].unflatten(-1, (2, -1)).transpose(1, 2), seen[key].unflatten(-1, (2, -1)).transpose(1, 2)) for query, key in parts
    ):
        scores.append(query @ key.transpose(2, 3) / query.shape[-1] ** 0.5)
    return outputs.logits, outputs.hidden_states, scores


# The student's hidden states of one example, without padding, by layer -> the sum of its errors, and of how many tokens.
StatesError = Callable[[list[int], list[int], Sequence[Tensor]], tuple[Tensor, int]]


class Plain:
    """Distilling written out: one teacher that is asked an example at a time, losses by loops over examples, SGD by hand.

    Args:
        model: the student.
        guide: the teacher, live.
        states_error: in place of all tokens and dimensions; attention scores are left out then.
    """

    def __init__(self, model: nn.Module, guide: nn.Module, states_error: StatesError | None = None) -> None:
        self.model, self.guide, self.states_error = model.train(), guide.eval(), states_error
        self.told: dict[tuple[int, ...], Any] = {}

    def ask(self, ids: list[int], types: list[int]) -> Any:
        if (*ids, *types) not in self.told:
            inputs = {
                "input_ids": torch.tensor([ids]),
                "token_type_ids": torch.tensor([types]),
                "attention_mask": torch.ones(1, len(ids)).long(),
            }
            with torch.no_grad():
                self.told[*ids, *types] = shown(self.guide, inputs)
        return self.told[*ids, *types]

    def step(self, batches: list[Batch]) -> float:
        """One step of the optimizer over these micro-batches."""
        logits = labels = states = scores = torch.zeros(())
        examples = tokens = selected = 0
        for batch in batches:
            ours = shown(self.model, batch)
            for row in range(len(batch["input_ids"])):
                real = batch["attention_mask"][row].bool()
                ids, types = batch["input_ids"][row][real].tolist(), batch["token_type_ids"][row][real].tolist()
                theirs = self.ask(ids, types)
                examples, tokens = examples + 1, tokens + len(ids)
                p, q = (theirs[0][0] / 2).softmax(-1), (ours[0][row] / 2).softmax(-1)
                logits = logits + 4 * (p * (p / q).log()).sum()
                labels = labels + F.cross_entropy(ours[0][row], batch["labels"][row])
                mine = [state[row][real] for state in ours[1]]
                if self.states_error is not None:
                    error, count = self.states_error(ids, types, mine)
                    states, selected = states + error, selected + count
                    continue
                for student_layer, teacher_layer in MAP.pairs:
                    states = states + (mine[student_layer] - theirs[1][teacher_layer][0]).square().mean(-1).sum()
                    square = ours[2][student_layer - 1][row][:, real][:, :, real]
                    scores = scores + (square - theirs[2][teacher_layer - 1][0]).square().mean((0, 2)).sum()
        loss = logits / examples + 0.5 * labels / examples + 2 * states / (selected or tokens) + scores / tokens
        self.model.zero_grad()
        loss.backward()
        with torch.no_grad():
            for parameter in self.model.parameters():
                if parameter.grad is not None:
                    parameter -= RATE * parameter.grad
        return loss.item()

    def follow(self, steps: Mapping[int, list[Batch]]) -> list[float]:
        return [self.step(steps[number]) for number in sorted(steps)]

    def weights(self) -> dict[str, Tensor]:
        return {name: parameter.detach().clone() for name, parameter in self.model.named_parameters()}


def agree(trainer: Recording, plain: Plain, start: dict[str, Tensor], steps: int = 50) -> None:
    """Losses and weights to 1e-6; and the weights moved by more than that."""
    live = plain.follow(trainer.steps)
    assert len(live) == steps
    assert [trainer.values[step] for step in sorted(trainer.values)] == pytest.approx(live, abs=1e-6, rel=1e-6)
    assert largest_difference(weights(trainer), plain.weights()) < 1e-6
    assert largest_difference(weights(trainer), start) > 1e-2
    assert live[-1] < live[0]


def whats_in(batches: list[Batch]) -> list[tuple[int, ...]]:
    return [
        tuple(ids[mask.bool()].tolist()) for batch in batches for ids, mask in zip(batch["input_ids"], batch["attention_mask"], strict=True)
    ]


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


# --- two processes ---

SCRIPT = """
import os, sys
from pathlib import Path
import torch
from tests.test_cached_training import cached
from tests.test_distill_trainer import student, teacher, weights

folder, rank = Path(sys.argv[1]), int(os.environ["RANK"])
torch.set_num_threads(1)
trainer = cached(folder, student(), teacher() if sys.argv[2] == "build" else None, max_steps=20, per_device_train_batch_size=4)
torch.save((trainer.steps, trainer.values, weights(trainer)), folder / f"{sys.argv[2]}-{rank}.pt")
sys.stdout.flush()
os._exit(0)  # without Python's shutdown, in which a gloo thread may abort the process
"""


@pytest.mark.slow
def test_two_processes_build_together_and_train_as_the_plain_loop_does(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    for what in ("build", "read"):
        launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
        done = subprocess.run(
            [sys.executable, *launcher, str(script), str(tmp_path), what],
            env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
            capture_output=True,
            text=True,
            timeout=300,
        )
        assert done.returncode == 0, done.stderr[-3000:]
    assert json.loads((tmp_path / "cache" / "manifest.json").read_text())["examples"] == 16
    start = {name: parameter.detach().clone() for name, parameter in student().named_parameters()}
    for what in ("build", "read"):
        ranks = [torch.load(tmp_path / f"{what}-{rank}.pt") for rank in range(2)]
        merged = {step: ranks[0][0][step] + ranks[1][0][step] for step in ranks[0][0]}
        assert whats_in(ranks[0][0][0]) != whats_in(ranks[1][0][0])
        plain = Plain(student(), teacher())
        live = plain.follow(merged)
        assert [ranks[0][1][step] + ranks[1][1][step] for step in range(20)] == pytest.approx(live, abs=1e-6, rel=1e-6)
        for _, _, ends in ranks:
            assert largest_difference(ends, plain.weights()) < 1e-6
            assert largest_difference(ends, start) > 1e-3
