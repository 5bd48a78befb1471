"""Progressive knowledge transfer: one layer after another from the bottom, what was taught frozen; against a plain loop."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hf_compress.arguments import CompressionArguments
from hf_compress.errors import ArgumentError, CompressionError, LossError
from hf_compress.layers.layer_map import LayerMap
from hf_compress.losses.combined_layers import CombinedLayersLoss
from hf_compress.losses.hidden_states import EmbeddingsLoss, HiddenStatesLoss
from hf_compress.losses.logits import LogitsLoss
from hf_compress.losses.loss import Loss
from hf_compress.losses.recipes import losses_of
from hf_compress.trainer import DistillTrainer
from tests.tiny_models import tiny_model
from tests.tiny_runs import NARROW, arguments, largest_difference, rows, student, teacher, weights

RATE = 0.05
FLAGS = {"distill_phases": "intermediate=6,prediction=2", "distill_progressive": True}


def pupil(**config: Any) -> nn.Module:
    return tiny_model("bert", num_layers=3, seed=2, **config)


def run(
    folder: Path, losses: list[Loss], model: nn.Module | None = None, *, resume: str | bool | None = None, flags: Any = None, **more: Any
) -> DistillTrainer:
    torch.manual_seed(5)
    trainer = DistillTrainer(
        model or pupil(),
        arguments(folder, max_steps=-1, learning_rate=RATE, **more),
        teacher=tiny_model("bert", num_layers=6, seed=1),
        losses=losses,
        compression=CompressionArguments(**(flags or FLAGS)),
        train_dataset=rows(),
    )
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def plain(model: nn.Module, guide: nn.Module, teaches: dict[int, int], epochs: int, below: float = 0.0) -> list[dict[str, Tensor]]:
    """Stage after stage by SGD over the whole data, layers below learning at a share of the rate; the weights at the end of each."""
    batch = {name: torch.tensor(rows()[name]) for name in ("input_ids", "attention_mask")}
    real, ends = batch["attention_mask"].bool(), []
    with torch.no_grad():
        theirs = guide(**batch, output_hidden_states=True).hidden_states
    done = 0
    for layer, by in teaches.items():
        learning = [model.bert.encoder.layer[number - 1] for number in range(done + 1, layer + 1)]
        learning += [model.bert.embeddings] if done == 0 else []
        slow = [model.bert.embeddings, *model.bert.encoder.layer[:done]] if done else []
        done = layer
        for _ in range(epochs):
            ours = model(**batch, output_hidden_states=True).hidden_states
            loss = F.mse_loss(ours[layer][real], theirs[by][real])
            loss = loss + F.mse_loss(ours[0][real], theirs[0][real]) if layer == min(teaches) else loss
            model.zero_grad()
            loss.backward()
            with torch.no_grad():
                for module, rate in (*((each, RATE) for each in learning), *((each, RATE * below) for each in slow)):
                    for parameter in module.parameters():
                        parameter -= rate * parameter.grad if parameter.grad is not None else 0
        ends.append({name: parameter.detach().clone() for name, parameter in model.named_parameters()})
    return ends


@pytest.mark.parametrize("teaches", [{1: 2, 2: 4, 3: 6}, {2: 5, 3: 6}])
def test_a_plain_loop(tmp_path: Path, teaches: dict[int, int]) -> None:
    losses: list[Loss] = [EmbeddingsLoss(), HiddenStatesLoss(LayerMap(tuple(teaches.items())))]
    flags = {"distill_phases": "intermediate=6", "distill_progressive": True}
    trainer = run(tmp_path, losses, flags=flags)
    ends = plain(pupil(), tiny_model("bert", num_layers=6, seed=1).eval(), teaches, 6 // len(teaches))
    assert sum("loss" in entry for entry in trainer.state.log_history) == 6
    assert largest_difference(weights(trainer), ends[-1]) < 1e-6
    stages = [[name for name in ends[0] if not torch.equal(before[name], after[name])] for before, after in pairwise(ends)]
    assert all(
        moved and all(f"encoder.layer.{layer - 1}." in name for name in moved) for moved, layer in zip(stages, [*teaches][1:], strict=True)
    )


def test_folders_parts_and_resuming_in_a_stage(tmp_path: Path) -> None:
    """Through a projection that all layers share; then the predictions train everything."""
    losses = [*losses_of("mobilebert"), EmbeddingsLoss()]
    unbroken = run(tmp_path / "a", losses, pupil(**NARROW), save_strategy="epoch")
    names = ["phase-1-intermediate-layer-1", "phase-2-intermediate-layer-2", "phase-3-intermediate-layer-3"]
    assert sorted(folder.name for folder in (tmp_path / "a").glob("phase-*")) == names
    parts = [{name for name in entry if name.startswith("loss_")} for entry in unbroken.state.log_history if "loss" in entry]
    layers, predictions = {"loss_hidden_states", "loss_attentions"}, {"loss_logits", "loss_labels"}
    assert parts == [layers | {"loss_embeddings"}] * 2 + [layers] * 4 + [predictions] * 2
    for number, name in enumerate(names[:2]):
        resumed = run(tmp_path / "a", losses, student_of(number), resume=str(tmp_path / "a" / name / "checkpoint-1"))
        assert largest_difference(weights(unbroken), weights(resumed)) < 1e-6, name
    assert all(parameter.requires_grad for name, parameter in unbroken.model.named_parameters() if "projections" not in name)


def test_layers_below_may_learn_slowly(tmp_path: Path) -> None:
    """Under a decay and a momentum, which make several groups of parameters; a resumed run goes on with them."""
    losses: list[Loss] = [EmbeddingsLoss(), HiddenStatesLoss()]
    flags = {"distill_phases": "intermediate=6", "distill_progressive": True, "distill_progressive_rate": 0.25}
    ends = plain(pupil(), tiny_model("bert", num_layers=6, seed=1).eval(), {1: 2, 2: 4, 3: 6}, 2, below=0.25)
    trainer = run(tmp_path / "a", losses, flags=flags)
    assert largest_difference(weights(trainer), ends[-1]) < 1e-6
    assert trainer.optimizer is None or {group["lr"] for group in trainer.optimizer.param_groups} == {RATE, 0.25 * RATE}
    adam = {"optim": "adamw_torch", "weight_decay": 0.1, "save_strategy": "epoch"}
    unbroken = run(tmp_path / "b", losses, flags=flags, **adam)
    resumed = run(tmp_path / "b", losses, pupil(), flags=flags, resume=str(tmp_path / "b" / "checkpoint-1"), **adam)
    assert largest_difference(weights(unbroken), weights(resumed)) < 1e-6


def student_of(seed: int) -> nn.Module:
    """Other weights, which the checkpoint replaces."""
    return tiny_model("bert", num_layers=3, seed=20 + seed, **NARROW)


def refused(folder: Path, error: type[CompressionError], match: str, losses: list[Loss], model: nn.Module, guide: nn.Module) -> None:
    with pytest.raises(error, match=match):
        DistillTrainer(
            model,
            arguments(folder, max_steps=-1),
            teacher=guide,
            losses=losses,
            compression=CompressionArguments(**FLAGS),
            train_dataset=rows(),
        ).train()


def test_what_cannot_be_taught_layer_by_layer_is_refused(tmp_path: Path) -> None:
    states: list[Loss] = [HiddenStatesLoss(), LogitsLoss()]
    refused(tmp_path, LossError, "combined_layers compares layers all at once", [CombinedLayersLoss(), LogitsLoss()], student(), teacher())
    refused(tmp_path, LossError, "no loss compares any", [EmbeddingsLoss(), LogitsLoss()], student(), teacher())
    shared = [tiny_model("albert", num_layers=layers, seed=layers) for layers in (2, 4)]
    refused(tmp_path, LossError, "share their weights", states, *shared)
    stacks = [tiny_model("bart", num_layers=layers, seed=layers) for layers in (2, 4)]
    refused(tmp_path, LossError, "the student has encoder and decoder", states, *stacks)
    with pytest.raises(ArgumentError, match="intermediate phase, and there is none"):
        CompressionArguments(distill_progressive=True, distill_phases="prediction=3")
    with pytest.raises(ArgumentError, match="distill_progressive_rate belongs to --distill_progressive"):
        CompressionArguments(distill_progressive_rate=0.1, distill_phases="intermediate=3")
