"""DistillTrainer on tiny models: gradients, counts, padding, evaluation, saving, resuming, phases, refusals."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from safetensors import safe_open
from safetensors.torch import load_file
from torch import nn
from transformers import TrainingArguments

from hf_compress.arguments import CompressionArguments
from hf_compress.errors import ArgumentError, DataError, LossError, TeacherError
from hf_compress.layers.layer_map import LayerMap
from hf_compress.losses.attention_scores import AttentionScoresLoss
from hf_compress.losses.hidden_states import EmbeddingsLoss, HiddenStatesLoss
from hf_compress.losses.labels import LabelsLoss
from hf_compress.losses.logits import LogitsLoss
from hf_compress.losses.loss import Loss
from hf_compress.projections import FILE_NAME
from hf_compress.teacher_checks import label_order, labels_of
from hf_compress.trainer import DistillTrainer
from tests.tiny_models import tiny_model

# Lengths that differ four times, so that a mean of means shows.
LENGTHS = (20, 5, 12, 6, 18, 5, 7, 20, 5, 5, 16, 9, 20, 6, 5, 11)


def rows(padded_to: int | None = None, count: int = 16) -> Dataset:
    generator = torch.Generator().manual_seed(3)
    examples = []
    for index in range(count):
        ids = torch.randint(3, 50, (LENGTHS[index % 16],), generator=generator).tolist()
        padding = (padded_to or 24) - len(ids)
        examples.append({"input_ids": ids + [0] * padding, "attention_mask": [1] * len(ids) + [0] * padding, "label": index % 2})
    return Dataset.from_list(examples)


def every_loss() -> list[Loss]:
    return [LogitsLoss(), HiddenStatesLoss(), EmbeddingsLoss(), AttentionScoresLoss(), LabelsLoss(weight=0.5)]


def teacher() -> nn.Module:
    return tiny_model("bert", num_layers=4, seed=1)


def student(**config: Any) -> nn.Module:
    return tiny_model("bert", num_layers=2, seed=2, **config)


NARROW = {"hidden_size": 8, "intermediate_size": 12}


def arguments(folder: Path, **more: Any) -> TrainingArguments:
    settings: dict[str, Any] = {
        "output_dir": str(folder),
        "per_device_train_batch_size": 16,
        "max_steps": 1,
        "learning_rate": 0.1,
        "optim": "sgd",
        "lr_scheduler_type": "constant",
        "max_grad_norm": 1e9,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": [],
        "use_cpu": True,
        "disable_tqdm": True,
        "seed": 7,
    }
    return TrainingArguments(**{**settings, **more})


def trained(
    folder: Path, losses: list[Loss], *, model: nn.Module | None = None, data: Dataset | None = None, **more: Any
) -> DistillTrainer:
    torch.manual_seed(5)  # projections are random
    flags = more.pop("compression", None)
    trainer = DistillTrainer(
        model or student(**NARROW),
        arguments(folder, **more),
        teacher=teacher(),
        losses=losses,
        compression=flags,
        train_dataset=rows() if data is None else data,
    )
    trainer.train()
    return trainer


def weights(trainer: DistillTrainer) -> dict[str, torch.Tensor]:
    return {name: parameter.detach().clone() for name, parameter in trainer.model.named_parameters()}


def largest_difference(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> float:
    assert one.keys() == other.keys()
    return max((one[name] - other[name]).abs().max().item() for name in one)


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


def refused(tmp_path: Path, error: type[Exception], match: str, **more: Any) -> None:
    given: dict[str, Any] = {"teacher": teacher(), "losses": [LogitsLoss()], "train_dataset": rows(), **more}
    model = given.pop("model", None) or student()
    with pytest.raises(error, match=match):
        DistillTrainer(model, given.pop("args", None) or arguments(tmp_path), **given)
    assert not list(tmp_path.iterdir())


def test_no_teacher(tmp_path: Path) -> None:
    refused(tmp_path, TeacherError, "no teacher: give --teacher_model_name_or_path", teacher=None, losses=None)
    refused(tmp_path, TeacherError, "logits compare with a teacher", teacher=None)


def test_a_teacher_that_is_not_there(tmp_path: Path) -> None:
    refused(tmp_path, TeacherError, "cannot be loaded. It is neither a folder", teacher="no-such-teacher")


def test_a_teacher_without_a_trained_head(tmp_path: Path) -> None:
    folder = tmp_path.parent / f"{tmp_path.name}-headless"
    tiny_model("bert", head="masked_lm").save_pretrained(folder)
    refused(tmp_path, TeacherError, "no trained head: .*classifier.* would be newly initialised", teacher=str(folder))


def test_a_teacher_with_another_vocabulary(tmp_path: Path) -> None:
    refused(tmp_path, TeacherError, "other vocabularies: 50 and 60 tokens", teacher=tiny_model("bert", vocab_size=60))


def named(names: list[str]) -> dict[str, Any]:
    return {"id2label": dict(enumerate(names)), "label2id": {name: index for index, name in enumerate(names)}}


def test_a_teacher_with_other_labels(tmp_path: Path) -> None:
    refused(tmp_path, TeacherError, "tells 2 labels apart .* the teacher 3", teacher=tiny_model("bert", num_labels=3))
    other = tiny_model("bert", **named(["cat", "dog"]))
    refused(
        tmp_path, TeacherError, "student's labels are yes, no, the teacher's cat, dog", teacher=other, model=student(**named(["yes", "no"]))
    )


def test_labels_in_another_order_are_put_right(tmp_path: Path) -> None:
    guide = tiny_model("bert", seed=4, **named(["A", "B", "C"]))
    data = Dataset.from_list([{**row, "label": 0} for row in rows()])
    shuffled = tiny_model("bert", seed=4, **named(["C", "A", "B"]))
    with torch.no_grad():
        order = torch.tensor([2, 0, 1])
        shuffled.classifier.weight.copy_(guide.classifier.weight[order])
        shuffled.classifier.bias.copy_(guide.classifier.bias[order])
    losses = []
    for number, model in enumerate((guide, shuffled)):
        trainer = DistillTrainer(
            student(**named(["a", "b", "c"])), arguments(tmp_path / str(number)), teacher=model, losses=[LogitsLoss()], train_dataset=data
        )
        trainer.train()
        losses.append(trainer.state.log_history[0]["loss"])
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    assert losses[0] > 1e-4


def test_names_that_stand_in_label2id_alone_count() -> None:
    pupil, guide = student(), tiny_model("bert", **named(["no", "yes"]))
    pupil.config.label2id = {"yes": 0, "no": 1}  # as run_glue.py leaves it: id2label still says LABEL_0, LABEL_1
    assert pupil.config.id2label == {0: "LABEL_0", 1: "LABEL_1"}
    assert label_order(pupil, labels_of(guide)) == (1, 0)


def test_student_and_teacher_must_be_two_models(tmp_path: Path) -> None:
    model = student()
    refused(tmp_path, TeacherError, "same model object", model=model, teacher=model)


def test_empty_and_endless_data(tmp_path: Path) -> None:
    refused(tmp_path, DataError, "training data set is empty", train_dataset=rows().select([]))


def test_reentrant_checkpointing(tmp_path: Path) -> None:
    args = arguments(tmp_path, gradient_checkpointing=True, gradient_checkpointing_kwargs={"use_reentrant": True})
    refused(tmp_path, ArgumentError, "use_reentrant", args=args)


def test_batches_that_cannot_be_told_from_padding(tmp_path: Path) -> None:
    data = rows().remove_columns("attention_mask")
    model = tiny_model("bert", num_layers=2, pad_token_id=None)
    trainer = DistillTrainer(model, arguments(tmp_path), teacher=teacher(), losses=[HiddenStatesLoss()], train_dataset=data)
    with pytest.raises(DataError, match="no attention_mask"):
        trainer.train()
