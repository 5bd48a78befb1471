"""DistillTrainer on tiny models: gradients, counts, padding, evaluation, saving, resuming, phases."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors import safe_open
from safetensors.torch import load_file
from torch import nn

from hf_compress.arguments import CompressionArguments
from hf_compress.errors import LossError, TeacherError
from hf_compress.layers.layer_map import LayerMap
from hf_compress.losses.attention_scores import AttentionScoresLoss
from hf_compress.losses.hidden_states import HiddenStatesLoss
from hf_compress.losses.labels import LabelsLoss
from hf_compress.losses.logits import LogitsLoss
from hf_compress.projections import FILE_NAME
from hf_compress.trainer import DistillTrainer
from tests.tiny_models import tiny_model
from tests.tiny_runs import NARROW, arguments, every_loss, largest_difference, rows, student, teacher, trained, weights


def test_accumulated_micro_batches_give_the_gradient_of_one_batch(tmp_path: Path) -> None:
    whole = trained(tmp_path / "a", every_loss())
    halves = trained(tmp_path / "b", every_loss(), per_device_train_batch_size=8, gradient_accumulation_steps=2)
    quarters = trained(tmp_path / "c", every_loss(), per_device_train_batch_size=4, gradient_accumulation_steps=4)
    log = whole.state.log_history[0]
    assert log["loss"] > 0.01 and log["grad_norm"] > 0.01
    assert largest_difference(weights(whole), weights(halves)) < 1e-6
    assert largest_difference(weights(whole), weights(quarters)) < 1e-6
    assert halves.state.log_history[0]["loss"] == pytest.approx(log["loss"], rel=1e-5)
    for name in ("loss_logits", "loss_hidden_states", "loss_embeddings", "loss_attention_scores", "loss_labels"):
        assert quarters.state.log_history[0][name] == pytest.approx(log[name], rel=1e-4)


def test_one_step_against_a_plain_loop(tmp_path: Path) -> None:
    """The whole of a step written out: forward, losses by loops over examples and tokens, SGD."""
    model, guide, data = student(), teacher(), rows()
    trainer = trained(
        tmp_path,
        [LogitsLoss(temperature=2.0, weight=0.7), HiddenStatesLoss(LayerMap(((1, 2), (2, 4))), weight=0.3)],
        model=copy.deepcopy(model),
    )
    tokens = 0
    total = torch.zeros(())
    for row in data:
        length = sum(row["attention_mask"])
        inputs = {"input_ids": torch.tensor([row["input_ids"][:length]]), "attention_mask": torch.ones(1, length, dtype=torch.long)}
        ours = model(**inputs, output_hidden_states=True)
        with torch.no_grad():
            theirs = guide(**inputs, output_hidden_states=True)
        tokens += length
        p, q = (theirs.logits / 2).softmax(-1), (ours.logits / 2).softmax(-1)
        total = total + 0.7 * 4 * (p * (p / q).log()).sum() / len(data)
        for mine, other in ((1, 2), (2, 4)):
            for token in range(length):
                square = (ours.hidden_states[mine][0, token] - theirs.hidden_states[other][0, token]).pow(2).mean()
                total = total + 0.3 * square / sum(sum(r["attention_mask"]) for r in data)
    total.backward()
    assert trainer.state.log_history[0]["loss"] == pytest.approx(total.item(), rel=1e-4)
    for name, parameter in model.named_parameters():
        expected = parameter.detach() - 0.1 * (parameter.grad if parameter.grad is not None else 0.0)
        assert torch.allclose(expected, dict(trainer.model.named_parameters())[name], atol=1e-6), name


def test_padding_changes_nothing(tmp_path: Path) -> None:
    tight = trained(tmp_path / "a", every_loss())
    loose = trained(tmp_path / "b", every_loss(), data=rows(padded_to=40))
    untrimmed = trained(tmp_path / "c", every_loss(), data=rows(padded_to=40), compression=CompressionArguments(trim_padding=False))
    assert largest_difference(weights(tight), weights(loose)) < 1e-6
    assert largest_difference(weights(tight), weights(untrimmed)) < 1e-5


def test_training_moves_the_student_and_not_the_teacher(tmp_path: Path) -> None:
    guide = teacher()
    before = {name: tensor.clone() for name, tensor in guide.state_dict().items()}
    model = student()
    start = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    trainer = DistillTrainer(model, arguments(tmp_path, max_steps=3), teacher=guide, losses=every_loss(), train_dataset=rows())
    guide.train()  # somebody else's hands
    trainer.train()
    assert all(torch.equal(before[name], tensor) for name, tensor in guide.state_dict().items())
    assert not guide.training
    assert not any(parameter.requires_grad for parameter in guide.parameters())
    moved = [name for name, tensor in model.state_dict().items() if name in start and not torch.equal(tensor, start[name])]
    assert len(moved) > 0.9 * len(start)
    assert not any("teacher" in name for name in trainer.model.state_dict())


def test_dropout_of_the_teacher_is_off(tmp_path: Path) -> None:
    guide = tiny_model("bert", num_layers=4, seed=1, hidden_dropout_prob=0.5, attention_probs_dropout_prob=0.5).train()
    runs = [
        DistillTrainer(
            student(), arguments(tmp_path / str(i)), teacher=guide, losses=[LogitsLoss(), HiddenStatesLoss()], train_dataset=rows()
        )
        for i in range(2)
    ]
    for number, run in enumerate(runs):
        torch.manual_seed(number)
        run.train()
    assert runs[0].state.log_history[0]["loss"] == runs[1].state.log_history[0]["loss"]


def test_evaluation_is_the_tasks_own(tmp_path: Path) -> None:
    trainer = trained(tmp_path, every_loss())
    data = rows()
    metrics = trainer.evaluate(data)
    prediction = trainer.predict(data)
    assert prediction.predictions.shape == (16, 2)
    trainer.model.eval()
    inputs = {name: torch.tensor(data[name]) for name in ("input_ids", "attention_mask")}
    with torch.no_grad():
        expected = trainer.model(**inputs, labels=torch.tensor(data["label"])).loss.item()
    assert metrics["eval_loss"] == pytest.approx(expected, rel=1e-4)


def test_labels_that_no_loss_uses_never_reach_the_student(tmp_path: Path) -> None:
    seen: list[bool] = []
    model = student()
    model.register_forward_pre_hook(lambda module, args, kwargs: seen.append("labels" in kwargs), with_kwargs=True)
    trained(tmp_path, [LogitsLoss(), LabelsLoss(weight=0.0)], model=model)
    assert seen == [False]


def test_a_teacher_keeps_columns_that_the_student_does_not_know(tmp_path: Path) -> None:
    data = rows().add_column("token_type_ids", [[0, 1] * 12] * 16)
    seen: dict[str, set[str]] = {}
    guide, model = teacher(), tiny_model("distilbert", num_layers=2)
    guide.register_forward_pre_hook(lambda module, args, kwargs: seen.update(teacher=set(kwargs)), with_kwargs=True)
    model.register_forward_pre_hook(lambda module, args, kwargs: seen.update(student=set(kwargs)), with_kwargs=True)
    trained_ = DistillTrainer(model, arguments(tmp_path), teacher=guide, losses=[LogitsLoss(), HiddenStatesLoss()], train_dataset=data)
    trained_.train()
    assert seen == {"student": {"input_ids", "attention_mask"}, "teacher": {"input_ids", "attention_mask", "token_type_ids"}}


def test_the_saved_student_is_a_plain_model_and_projections_lie_beside(tmp_path: Path) -> None:
    trainer = trained(tmp_path, every_loss(), save_strategy="steps", save_steps=1)
    trainer.save_model(str(tmp_path / "final"))
    for folder in (tmp_path / "final", tmp_path / "checkpoint-1"):
        with safe_open(folder / "model.safetensors", "pt") as stored:
            assert set(stored.keys()) == set(student(**NARROW).state_dict())
    assert (tmp_path / "checkpoint-1" / FILE_NAME).is_file()


def test_a_resumed_run_ends_where_an_unbroken_one_does(tmp_path: Path) -> None:
    unbroken = trained(tmp_path / "a", every_loss(), max_steps=4, per_device_train_batch_size=4)
    first = trained(tmp_path / "b", every_loss(), max_steps=4, per_device_train_batch_size=4, save_strategy="steps", save_steps=2)
    assert largest_difference(weights(unbroken), weights(first)) == 0.0
    torch.manual_seed(99)  # other projections and another student, unless they are read back
    resumed = DistillTrainer(
        tiny_model("bert", num_layers=2, seed=8, **NARROW),
        arguments(tmp_path / "c", max_steps=4, per_device_train_batch_size=4),
        teacher=teacher(),
        losses=every_loss(),
        train_dataset=rows(),
    )
    resumed.train(resume_from_checkpoint=str(tmp_path / "b" / "checkpoint-2"))
    assert largest_difference(weights(unbroken), weights(resumed)) < 1e-6


def test_resuming_with_other_projections_is_refused(tmp_path: Path) -> None:
    trained(tmp_path, every_loss(), save_strategy="steps", save_steps=1)
    other = DistillTrainer(
        student(**NARROW),
        arguments(tmp_path, max_steps=2),
        teacher=teacher(),
        losses=[HiddenStatesLoss(projection="per_layer")],
        train_dataset=rows(),
    )
    with pytest.raises(TeacherError, match="trained with the projections"):
        other.train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))


def test_phases_train_the_layers_first_and_leave_the_classifier_alone(tmp_path: Path) -> None:
    model = student(**NARROW)
    head = model.classifier.weight.detach().clone()
    seen: list[tuple[bool, set[str]]] = []

    class Watching(DistillTrainer):
        def training_step(self, *args: Any, **kwargs: Any) -> torch.Tensor:
            step = super().training_step(*args, **kwargs)
            assert self.distillation is not None
            seen.append((torch.equal(model.classifier.weight, head), {loss.name for loss in self.distillation.active}))
            return step

    flags = CompressionArguments(distill_phases="intermediate=2,prediction=1")
    settings = arguments(tmp_path, max_steps=-1, per_device_train_batch_size=8, save_strategy="epoch")
    trainer = Watching(model, settings, teacher=teacher(), losses=every_loss(), compression=flags, train_dataset=rows())
    trainer.train()
    assert [names for _, names in seen] == [{"hidden_states", "embeddings", "attention_scores"}] * 4 + [{"logits", "labels"}] * 2
    assert all(same for same, _ in seen[:5])
    assert not torch.equal(model.classifier.weight, head)
    assert model.classifier.weight.requires_grad
    assert (tmp_path / "phase-1-intermediate" / "checkpoint-4").is_dir() and (tmp_path / "checkpoint-2").is_dir()
    assert settings.output_dir == str(tmp_path) and settings.lr_scheduler_type == "constant"


def test_a_run_in_phases_resumes_in_its_phase(tmp_path: Path) -> None:
    def run(folder: Path, resume: Any = None) -> DistillTrainer:
        torch.manual_seed(5)
        flags = CompressionArguments(distill_phases="intermediate=2,prediction=1")
        settings = arguments(folder, max_steps=-1, per_device_train_batch_size=8, save_strategy="epoch")
        trainer = DistillTrainer(
            student(**NARROW), settings, teacher=teacher(), losses=every_loss(), compression=flags, train_dataset=rows()
        )
        trainer.train(resume_from_checkpoint=resume)
        return trainer

    whole = run(tmp_path)
    resumed = run(tmp_path, str(tmp_path / "phase-1-intermediate" / "checkpoint-2"))
    assert largest_difference(weights(whole), weights(resumed)) < 1e-6


def test_a_phase_without_losses_is_refused(tmp_path: Path) -> None:
    with pytest.raises(LossError, match="intermediate phase"):
        flags = CompressionArguments(distill_phases="intermediate=1,prediction=1")
        trained(tmp_path, [LogitsLoss()], compression=flags, max_steps=-1)


def test_labels_alone_need_no_teacher(tmp_path: Path) -> None:
    trainer = DistillTrainer(student(), arguments(tmp_path), losses=[LabelsLoss()], train_dataset=rows())
    trainer.train()
    assert trainer.state.log_history[0]["loss"] > 0.1


def test_model_init_builds_the_same_student_again(tmp_path: Path) -> None:
    def build() -> nn.Module:
        return tiny_model("bert", num_layers=4, seed=2)

    trainer = DistillTrainer(
        None,
        arguments(tmp_path),
        teacher=teacher(),
        losses=[LogitsLoss(), HiddenStatesLoss()],
        compression=CompressionArguments(layer_drop_strategy="top", num_layers_to_drop=2),
        train_dataset=rows(),
        model_init=build,
    )
    trainer.train()
    assert trainer.model.config.num_hidden_layers == 2
    given = tiny_model("bert", num_layers=4, seed=2)
    flags = CompressionArguments(layer_drop_strategy="top", num_layers_to_drop=2)
    plain = DistillTrainer(
        given, arguments(tmp_path), teacher=teacher(), losses=[LogitsLoss(), HiddenStatesLoss()], compression=flags, train_dataset=rows()
    )
    plain.train()
    assert largest_difference(weights(trainer), weights(plain)) == 0.0
    assert trainer.state.log_history[0]["loss_hidden_states"] > 0.01


def test_data_that_comes_after_init_is_distilled_on(tmp_path: Path) -> None:
    trainer = DistillTrainer(student(), arguments(tmp_path), teacher=teacher(), losses=[LogitsLoss()])
    trainer.train_dataset = rows()
    trainer.train()
    assert "loss_logits" in trainer.state.log_history[0]


def test_after_training_the_models_are_plain_and_a_copy_trains_on(tmp_path: Path) -> None:
    model, guide = student(), teacher()
    DistillTrainer(model, arguments(tmp_path), teacher=guide, losses=every_loss(), train_dataset=rows()).train()
    assert not model._forward_hooks and not guide._forward_hooks
    assert model.config._attn_implementation == guide.config._attn_implementation == "sdpa"
    copied = copy.deepcopy(model).train()
    assert copied(input_ids=torch.tensor([[5, 6]]), labels=torch.tensor([1])).loss.item() > 0


def test_two_trainers_may_share_student_and_teacher(tmp_path: Path) -> None:
    model, guide = student(), teacher()
    first = DistillTrainer(model, arguments(tmp_path), teacher=guide, losses=[HiddenStatesLoss()], train_dataset=rows())
    second = DistillTrainer(model, arguments(tmp_path), teacher=guide, losses=[AttentionScoresLoss()], train_dataset=rows())
    for trainer, name in ((first, "loss_hidden_states"), (second, "loss_attention_scores"), (first, "loss_hidden_states")):
        trainer.train()
        assert trainer.state.log_history[0][name] > 1e-4


def test_a_peft_student_learns(tmp_path: Path) -> None:
    model = get_peft_model(student(**NARROW), LoraConfig(task_type="SEQ_CLS", r=2, target_modules=["query", "value"]))
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    trainer = DistillTrainer(model, arguments(tmp_path), teacher=teacher(), losses=every_loss(), train_dataset=rows())
    trainer.train()
    moved = [name for name, tensor in model.state_dict().items() if name in before and not torch.equal(tensor, before[name])]
    assert moved and all("lora" in name or "modules_to_save" in name for name in moved)
    trainer.save_model(str(tmp_path / "adapter"))
    assert not [name for name in load_file(tmp_path / "adapter" / "adapter_model.safetensors") if "projection" in name]


class OwnLoss(DistillTrainer):
    def compute_loss(self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None) -> Any:
        return model(**inputs).pop("loss")


def test_a_loss_of_ones_own_that_shadows_ours_is_noticed(tmp_path: Path) -> None:
    trainer = OwnLoss(student(), arguments(tmp_path), teacher=teacher(), losses=[LogitsLoss()], train_dataset=rows())
    with pytest.raises(LossError, match="computes a loss of its own"):
        trainer.train()


def test_nan_from_the_teacher_names_step_and_layer(tmp_path: Path) -> None:
    guide = teacher()
    trainer = DistillTrainer(
        student(),
        arguments(tmp_path, max_steps=6, per_device_train_batch_size=4, logging_steps=3),
        teacher=guide,
        losses=[HiddenStatesLoss()],
        train_dataset=rows(),
    )
    calls = []

    def spoil(module: nn.Module, args: Any, output: torch.Tensor) -> torch.Tensor:
        calls.append(1)
        return output * float("nan") if len(calls) == 2 else output

    guide.bert.encoder.layer[3].register_forward_hook(spoil, prepend=True)
    with pytest.raises(TeacherError, match=r"NaN or infinity at step 2, in hidden_states\.layers\.4"):
        trainer.train()
