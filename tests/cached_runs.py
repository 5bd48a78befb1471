"""Runs that train from a teacher on disk, and the same written out as a plain loop beside a live one."""

from __future__ import annotations

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
from hf_compress.errors import CompressionError
from hf_compress.layers.layer_map import LayerMap
from hf_compress.losses.attention_scores import AttentionScoresLoss
from hf_compress.losses.hidden_states import HiddenStatesLoss
from hf_compress.losses.labels import LabelsLoss
from hf_compress.losses.logits import LogitsLoss
from hf_compress.losses.loss import Loss
from hf_compress.trainer import DistillTrainer
from tests.cache.tiny_caches import pairs
from tests.tiny_runs import arguments, largest_difference, student, weights

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


def other_rows(places: range) -> Dataset:
    """Examples that are not among `data`."""
    rows = [{**row, "attention_mask": [1] * len(row["input_ids"]), "label": 0} for row in pairs(30, seed=77)]
    return Dataset.from_list([rows[place] for place in places])


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


def run(folder: Path, guide: Any = None, *, model: nn.Module | None = None, train: bool = True, **more: Any) -> DistillTrainer:
    """Train one step from the cache in `folder`, built first if there is a teacher and no cache."""
    flags: dict[str, Any] = {name: more.pop(name) for name in [*more] if name.startswith(("teacher_", "hsk", "hidden", "build", "distill"))}
    chosen: list[Loss] | None = more.pop("losses", [LogitsLoss(), HiddenStatesLoss(MAP)])
    settings = arguments(folder / "out", per_device_train_batch_size=4, **more.pop("settings", {}))
    given: dict[str, Any] = {"train_dataset": data(), "processing_class": tokenizer(), **more}
    trainer = DistillTrainer(
        model or student(),
        settings,
        teacher=guide,
        losses=chosen,
        compression=CompressionArguments(**{"teacher_cache_dir": str(folder / "cache"), **flags}),
        **given,
    )
    if train:
        trainer.train()
    return trainer


def refused(folder: Path, error: type[CompressionError], *words: str, guide: Any = None, **more: Any) -> str:
    with pytest.raises(error) as caught:
        run(folder, guide, **more)
    for word in words:
        assert word in str(caught.value), f"{word!r} is not in: {caught.value}"
    return str(caught.value)
