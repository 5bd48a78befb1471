"""The student's own base as its teacher: the same run as with a copy of the base beside it, and the student none the wiser."""

from __future__ import annotations

import copy
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PromptTuningConfig, get_peft_model
from torch import nn

from hf_compress.adapter_off import AdapterOffTeacher, adapter_off_side
from hf_compress.arguments import CompressionArguments
from hf_compress.errors import ArgumentError, CompressionError, TeacherError
from hf_compress.layers.drop import drop_layers
from hf_compress.losses.attention_scores import AttentionScoresLoss
from hf_compress.losses.hidden_states import HiddenStatesLoss
from hf_compress.losses.labels import LabelsLoss
from hf_compress.losses.logits import LogitsLoss
from hf_compress.losses.loss import Loss
from hf_compress.signals import HiddenState, SignalSpec
from hf_compress.trainer import DistillTrainer
from tests.tiny_models import tiny_batch, tiny_model
from tests.tiny_runs import arguments, largest_difference, rows, weights

DROPOUT = {"hidden_dropout_prob": 0.2, "attention_probs_dropout_prob": 0.2}


def adapted(base: Any = None, **config: Any) -> Any:
    values = {"task_type": "SEQ_CLS", "target_modules": ["query", "dense"], "r": 2, "lora_dropout": 0.2, **config}
    torch.manual_seed(3)
    return get_peft_model(base or tiny_model("bert", num_layers=3, **DROPOUT), LoraConfig(**values))


def losses() -> list[Loss]:
    return [LogitsLoss(), HiddenStatesLoss(), AttentionScoresLoss(), LabelsLoss()]


def trained(folder: Path, model: nn.Module, teacher: Any, **more: Any) -> DistillTrainer:
    settings = {"max_steps": 4, "per_device_train_batch_size": 4, "learning_rate": 0.5, **more}
    chosen = settings.pop("losses", losses())
    flags = settings.pop("flags", None)
    args = arguments(folder, **settings)
    trainer = DistillTrainer(model, args, teacher=teacher, losses=chosen, compression=flags, train_dataset=rows())
    trainer.train()
    return trainer


@pytest.mark.parametrize("checkpointing", [False, True])
def test_as_with_a_copy_of_the_base_beside_it(tmp_path: Path, checkpointing: bool) -> None:
    """With dropout, so that a draw more or less would show; and with micro-batches, between which the base is asked."""
    base = tiny_model("bert", num_layers=3, **DROPOUT)
    more = {"gradient_checkpointing": checkpointing, "gradient_accumulation_steps": 2}
    beside = trained(tmp_path / "a", adapted(copy.deepcopy(base)), copy.deepcopy(base), **more)
    model = adapted(base)
    start = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    alone = trained(tmp_path / "b", model, AdapterOffTeacher(model), **more)
    assert largest_difference(weights(alone), weights(beside)) < 1e-7
    assert {name for name in start if not torch.equal(start[name], weights(alone)[name])} == {
        name for name in start if "lora_" in name or "modules_to_save" in name
    }
    last = alone.state.log_history[-2]
    assert min(last[f"loss_{name}"] for name in ("logits", "hidden_states", "attention_scores")) > 1e-6
    left = [[len(module._forward_hooks) for module in trainer.model.modules()] for trainer in (alone, beside)]
    assert left[0] == left[1] and sum(left[0]) == int(checkpointing)  # transformers' own, on the embeddings
    assert model.config._attn_implementation == "sdpa"


def test_the_student_is_left_as_it_was() -> None:
    model = adapted()
    model.train()
    model.get_base_model().bert.embeddings.eval()
    frozen = next(parameter for name, parameter in model.named_parameters() if "lora_A" in name)
    frozen.requires_grad_(False)
    for name, parameter in model.named_parameters():
        if "lora_B" in name or "modules_to_save" in name:
            parameter.data.normal_()
    modes = [module.training for module in model.modules()]
    wanted = [parameter.requires_grad for parameter in model.parameters()]
    drawn = torch.random.get_rng_state()
    batch = tiny_batch(model)
    shown = AdapterOffTeacher(model).signals(batch, SignalSpec(logits=True, hidden_states=frozenset({HiddenState("layers", 2)})))
    assert [module.training for module in model.modules()] == modes
    assert [parameter.requires_grad for parameter in model.parameters()] == wanted
    assert torch.equal(torch.random.get_rng_state(), drawn)
    assert not shown.logits["logits"].requires_grad

    base = tiny_model("bert", num_layers=3, **DROPOUT)
    with torch.no_grad():
        expected = base(**batch, output_hidden_states=True)
        assert not torch.allclose(model.eval()(**batch).logits, expected.logits, atol=1e-3)
    assert torch.equal(shown.logits["logits"], expected.logits)
    assert torch.equal(shown.hidden_states[HiddenState("layers", 2)], expected.hidden_states[2])


def test_by_a_flag(tmp_path: Path) -> None:
    flags = {"teacher_model_name_or_path": "adapter_off", "distill_recipe": "logits"}
    named = trained(tmp_path / "a", adapted(), None, losses=None, flags=CompressionArguments(**flags))
    model = adapted()
    given = trained(tmp_path / "b", model, AdapterOffTeacher(model), losses=[LogitsLoss(), LabelsLoss(weight=0.5)])
    assert largest_difference(weights(named), weights(given)) == 0.0
    assert named.state.log_history[2]["loss_logits"] > 0


@pytest.mark.parametrize(
    ("make", "error", "words"),
    [
        (lambda: tiny_model("bert"), TeacherError, "BertForSequenceClassification has no adapters"),
        (lambda: adapted(bias="all"), TeacherError, r"weights of the base are trained beside the adapters.*bias='none'"),
        (
            lambda: get_peft_model(tiny_model("bert"), PromptTuningConfig(task_type="SEQ_CLS", num_virtual_tokens=2)),
            TeacherError,
            "cannot be switched off",
        ),
    ],
)
def test_models_that_cannot_be_their_own_teachers(make: Any, error: type[CompressionError], words: str) -> None:
    with pytest.raises(error, match=words):
        AdapterOffTeacher(make())


def test_runs_that_would_teach_nothing(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    def refused(words: str, **more: Any) -> None:
        with pytest.raises((ArgumentError, TeacherError), match=words):
            trained(tmp_path, adapted(), "adapter_off", **more)

    refused("no loss reads the labels.*--distill_weights labels=1", losses=[LogitsLoss()])
    refused("--teacher_cache_dir", flags=CompressionArguments(teacher_cache_dir=str(tmp_path / "cache")))
    refused("this run drops layers of it", flags=CompressionArguments(layer_drop_strategy="top"))
    with pytest.raises(TeacherError, match="of another model"):
        trained(tmp_path, adapted(), AdapterOffTeacher(adapted()))

    with pytest.raises(ArgumentError, match="FSDP lets nobody call"):
        adapter_off_side(adapted(), "adapter_off", CompressionArguments(), losses(), is_fsdp=True)

    dropped = tiny_model("bert", num_layers=3)
    drop_layers(dropped, strategy="top")
    with caplog.at_level(logging.WARNING, logger="hf_compress"):
        trained(tmp_path, adapted(dropped), "adapter_off")
    assert "layers of that were dropped" in caplog.text
