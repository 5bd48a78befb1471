from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import AutoPeftModelForSequenceClassification, LoraConfig, TaskType, get_peft_model
from transformers import BertForSequenceClassification, PreTrainedModel, Trainer, TrainingArguments

from hf_compress.callbacks import LayerDropCallback
from hf_compress.errors import ArgumentError, LayerDropError
from hf_compress.layers.drop import drop_layers
from hf_compress.layers.record import recorded_drop
from tests.tiny_models import tiny_batch, tiny_model


@pytest.fixture
def data() -> Dataset:
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(3, 50, (16, 6), generator=generator)
    labels = torch.randint(2, (16,), generator=generator)
    rows = [{"input_ids": row.tolist(), "attention_mask": [1] * 6, "labels": int(label)} for row, label in zip(ids, labels, strict=True)]
    return Dataset.from_list(rows)


def arguments(folder: Path, **values: Any) -> TrainingArguments:
    usual = {
        "max_steps": 2,
        "save_steps": 1,
        "per_device_train_batch_size": 4,
        "report_to": [],
        "use_cpu": True,
        "disable_tqdm": True,
        "seed": 1,
    }
    return TrainingArguments(str(folder), **{**usual, **values})


def kept(model: Any) -> tuple[int, ...]:
    recorded = recorded_drop(model.config)
    return () if recorded is None else recorded["layers"].kept


def bert() -> Any:
    return tiny_model("bert", num_layers=6)


def test_train_save_evaluate_and_resume(tmp_path: Path, data: Dataset) -> None:
    model = bert()
    full = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    trainer = Trainer(model, arguments(tmp_path), train_dataset=data, eval_dataset=data, callbacks=[LayerDropCallback("symmetric")])
    assert kept(model) == (1, 2, 5, 6)
    assert torch.equal(model.state_dict()["bert.encoder.layer.2.output.dense.weight"], full["bert.encoder.layer.4.output.dense.weight"])
    trainer.train()
    assert trainer.optimizer is not None
    parameters = {id(parameter) for parameter in model.parameters()}
    assert {id(parameter) for group in trainer.optimizer.param_groups for parameter in group["params"]} == parameters
    assert not torch.equal(model.state_dict()["bert.encoder.layer.2.output.dense.weight"], full["bert.encoder.layer.4.output.dense.weight"])

    saved = BertForSequenceClassification.from_pretrained(tmp_path / "checkpoint-2")
    again = LayerDropCallback("symmetric")
    evaluator = Trainer(saved, arguments(tmp_path / "eval"), eval_dataset=data, callbacks=[again])
    assert again.drop is not None
    assert again.drop.already_done
    assert evaluator.evaluate()["eval_loss"] == pytest.approx(trainer.evaluate()["eval_loss"], abs=1e-6)
    evaluator.predict(data)

    resumed = Trainer(bert(), arguments(tmp_path), train_dataset=data, callbacks=[LayerDropCallback("symmetric")])
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))
    for name, tensor in model.state_dict().items():
        torch.testing.assert_close(resumed.model.state_dict()[name], tensor, rtol=0, atol=1e-6)


def test_resuming_with_another_drop(tmp_path: Path, data: Dataset) -> None:
    Trainer(bert(), arguments(tmp_path, max_steps=1), train_dataset=data, callbacks=[LayerDropCallback("top")]).train()
    checkpoint = str(tmp_path / "checkpoint-1")
    trainer = Trainer(bert(), arguments(tmp_path), train_dataset=data, callbacks=[LayerDropCallback("bottom")])
    with pytest.raises(LayerDropError, match="kept layers 1-4, and the model of this run has 3-6"):
        trainer.train(resume_from_checkpoint=checkpoint)
    model = bert()
    with pytest.raises(LayerDropError, match=r"kept layers 1-4 of 6, and this run asks for another drop \(strategy=bottom"):
        Trainer(model, arguments(tmp_path, resume_from_checkpoint=checkpoint), train_dataset=data, callbacks=[LayerDropCallback("bottom")])
    assert kept(model) == ()


def test_resuming_from_a_run_that_dropped_nothing(tmp_path: Path, data: Dataset) -> None:
    # With an optimizer's state torch itself would refuse it, by its size.
    Trainer(bert(), arguments(tmp_path, max_steps=1, save_only_model=True), train_dataset=data).train()
    checkpoint = str(tmp_path / "checkpoint-1")
    trainer = Trainer(bert(), arguments(tmp_path), train_dataset=data, callbacks=[LayerDropCallback("top")])
    with pytest.raises(LayerDropError, match="a run without LayerDropCallback"):
        trainer.train(resume_from_checkpoint=checkpoint)
    with pytest.raises(LayerDropError, match="has lost no layers"):
        Trainer(bert(), arguments(tmp_path, resume_from_checkpoint=checkpoint), callbacks=[LayerDropCallback("top")])


def test_resuming_a_run_whose_model_was_dropped_by_hand(tmp_path: Path, data: Dataset) -> None:
    def dropped() -> Any:
        model = bert()
        drop_layers(model, strategy="top")
        return model

    Trainer(dropped(), arguments(tmp_path, max_steps=1), train_dataset=data).train()
    resumed = Trainer(dropped(), arguments(tmp_path), train_dataset=data, callbacks=[LayerDropCallback("top")])
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))
    assert resumed.state.global_step == 2


def test_restored_callback_state(tmp_path: Path, data: Dataset) -> None:
    values: dict[str, Any] = {"restore_callback_states_from_checkpoint": True}
    Trainer(bert(), arguments(tmp_path, max_steps=1, **values), train_dataset=data, callbacks=[LayerDropCallback("top")]).train()
    written = json.loads((tmp_path / "checkpoint-1" / "trainer_state.json").read_text())["stateful_callbacks"]["LayerDropCallback"]
    assert written["args"] == {"strategy": "top", "freeze_embeddings": False, "layers_to_freeze": []}
    assert written["attributes"]["kept"] == {"layers": [1, 2, 3, 4]}
    resumed = Trainer(bert(), arguments(tmp_path, **values), train_dataset=data, callbacks=[LayerDropCallback("top")])
    resumed.train(resume_from_checkpoint=True)
    assert resumed.state.global_step == 2


def test_contribution_needs_examples_and_a_resumed_run_does_not(tmp_path: Path, data: Dataset) -> None:
    def callback() -> LayerDropCallback:
        return LayerDropCallback("contribution", num_layers_to_drop=2)

    model = bert()
    with pytest.raises(LayerDropError, match="measures the layers on examples"):
        Trainer(model, arguments(tmp_path), train_dataset=data, callbacks=[callback()])
    assert kept(model) == ()
    offered, given = callback(), LayerDropCallback("contribution", num_layers_to_drop=2, examples=data)
    offered.offer_examples(data)
    given.offer_examples([{"input_ids": [1]}])  # What was given itself wins.
    Trainer(model, arguments(tmp_path, max_steps=1), train_dataset=data, callbacks=[offered]).train()
    assert given.drop is None
    Trainer(bert(), arguments(tmp_path / "other"), callbacks=[given])
    assert given.drop is not None
    assert offered.drop is not None
    assert given.drop.stacks == offered.drop.stacks
    assert len(given.drop.stacks["layers"].similarities or ()) == 6

    resuming = bert()
    checkpoint = str(tmp_path / "checkpoint-1")
    resumed = Trainer(resuming, arguments(tmp_path, resume_from_checkpoint=checkpoint), train_dataset=data, callbacks=[callback()])
    assert kept(resuming) == offered.drop.stacks["layers"].kept
    resumed.train(resume_from_checkpoint=checkpoint)


def test_wrong_requests_leave_the_model_and_write_nothing(tmp_path: Path, data: Dataset) -> None:
    with pytest.raises(LayerDropError, match="Did you mean 'symmetric'"):
        LayerDropCallback("symetric")  # type: ignore[arg-type]
    with pytest.raises(LayerDropError, match="Nothing says which layers"):
        LayerDropCallback()
    model = bert()
    for callback in (
        LayerDropCallback("top", num_layers_to_drop=6),
        LayerDropCallback("top", freeze_embeddings=True, layers_to_freeze=[7]),
        LayerDropCallback(layers_to_drop=[7], freeze_embeddings=True),
    ):
        with pytest.raises(LayerDropError):
            Trainer(model, arguments(tmp_path / "out"), train_dataset=data, callbacks=[callback])
    assert kept(model) == ()
    assert len(model.bert.encoder.layer) == 6
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert not list((tmp_path / "out").iterdir())


def test_a_callback_that_came_too_late(tmp_path: Path, data: Dataset) -> None:
    trainer = Trainer(bert(), arguments(tmp_path), train_dataset=data, eval_dataset=data)
    trainer.add_callback(LayerDropCallback("top"))
    for use in (trainer.train, trainer.evaluate, lambda: trainer.predict(data)):
        with pytest.raises(LayerDropError, match="too late"):
            use()
    frozen_late = Trainer(bert(), arguments(tmp_path), train_dataset=data)
    frozen_late.add_callback(LayerDropCallback(freeze_embeddings=True))
    with pytest.raises(LayerDropError, match="too late"):
        frozen_late.train()


def test_a_model_init_that_builds_the_model_again(tmp_path: Path, data: Dataset) -> None:
    trainer = Trainer(model_init=bert, args=arguments(tmp_path), train_dataset=data, callbacks=[LayerDropCallback("top")])
    with pytest.raises(LayerDropError, match="model_init has built it anew"):
        trainer.train()

    def dropped() -> PreTrainedModel:
        model: PreTrainedModel = bert()
        drop_layers(model, strategy="top")
        return model

    trainer = Trainer(model_init=dropped, args=arguments(tmp_path), train_dataset=data, callbacks=[LayerDropCallback("top")])
    trainer.train()
    assert kept(trainer.model) == (1, 2, 3, 4)

    trainer = Trainer(model_init=bert, args=arguments(tmp_path), train_dataset=data, callbacks=[LayerDropCallback(layers_to_freeze=[1])])
    with pytest.raises(LayerDropError, match="what was frozen can be trained again"):
        trainer.train()


def test_an_optimizer_passed_in(tmp_path: Path, data: Dataset) -> None:
    model = bert()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(LayerDropError, match=r"holds 32 parameters of layers that are to be dropped"):
        Trainer(model, arguments(tmp_path), train_dataset=data, callbacks=[LayerDropCallback("top")], optimizers=(optimizer, None))
    assert kept(model) == ()
    head = torch.optim.SGD(model.classifier.parameters(), lr=0.1)
    Trainer(model, arguments(tmp_path), train_dataset=data, callbacks=[LayerDropCallback("top")], optimizers=(head, None)).train()
    assert kept(model) == (1, 2, 3, 4)


def test_freezing_with_and_without_a_drop(tmp_path: Path, data: Dataset) -> None:
    for strategy, there in (("symmetric", {0: 0, 3: 5}), (None, {0: 0, 5: 5})):
        model = bert()
        before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        callback = LayerDropCallback(strategy, freeze_embeddings=True, layers_to_freeze=[1, 3, 6])  # type: ignore[arg-type]
        Trainer(model, arguments(tmp_path, learning_rate=1e-2), train_dataset=data, callbacks=[callback]).train()
        after = model.state_dict()
        for now, then in there.items():
            assert torch.equal(
                after[f"bert.encoder.layer.{now}.output.dense.weight"], before[f"bert.encoder.layer.{then}.output.dense.weight"]
            )
        assert torch.equal(after["bert.embeddings.word_embeddings.weight"], before["bert.embeddings.word_embeddings.weight"])
        assert not torch.equal(after["bert.encoder.layer.1.output.dense.weight"], before["bert.encoder.layer.1.output.dense.weight"])


def test_adapters_get_the_dropped_base_beside_them(tmp_path: Path, data: Dataset) -> None:
    model: Any = get_peft_model(bert(), LoraConfig(task_type=TaskType.SEQ_CLS, target_modules=["query"], r=2))
    values: dict[str, Any] = {"learning_rate": 1e-1, "label_names": ["labels"]}
    trainer = Trainer(model, arguments(tmp_path, **values), train_dataset=data, callbacks=[LayerDropCallback("symmetric")])
    trainer.train()
    trainer.save_model()
    batch = tiny_batch(model)
    with torch.no_grad():
        expected = model.eval()(**batch).logits
        for folder in (tmp_path, tmp_path / "checkpoint-2"):
            loaded = AutoPeftModelForSequenceClassification.from_pretrained(folder).eval()
            torch.testing.assert_close(loaded(**batch).logits, expected, rtol=0, atol=1e-6)
            assert kept(loaded) == (1, 2, 5, 6)
    assert (tmp_path / "base_model" / "config.json").is_file()


def test_adapters_over_a_base_that_was_dropped_by_hand(tmp_path: Path) -> None:
    model: Any = get_peft_model(bert(), LoraConfig(task_type=TaskType.SEQ_CLS, target_modules=["query"], r=2))
    drop_layers(model, strategy="top")
    trainer = Trainer(model, arguments(tmp_path), callbacks=[LayerDropCallback("top")])
    trainer.save_model()
    assert kept(AutoPeftModelForSequenceClassification.from_pretrained(tmp_path)) == (1, 2, 3, 4)


class Flags:
    strategy = None
    num_layers_to_drop = None
    dropped: tuple[int, ...] | None = None
    kept = None
    layer_drop_threshold = None
    layer_drop_after_epochs = None
    layer_drop_every_n_epochs = None
    freeze_layers_before_drop = False
    freeze_embeddings = False
    frozen: tuple[int, ...] = ()
    stack = "both"


def test_from_arguments() -> None:
    with pytest.raises(ArgumentError, match="No flag asks"):
        LayerDropCallback.from_arguments(Flags())
    flags = Flags()
    flags.dropped, flags.frozen = (2, 3), (1,)
    callback = LayerDropCallback.from_arguments(flags)
    assert callback.request is not None
    assert callback.request.layers_to_drop == (2, 3)
    assert callback.request.stack is None
    assert callback.layers_to_freeze == (1,)


def test_frozen_layers_are_a_list_and_are_said(tmp_path: Path, data: Dataset, caplog: pytest.LogCaptureFixture) -> None:
    with pytest.raises(LayerDropError, match=r"layers_to_freeze is '1-3', but in Python it is a list of numbers"):
        LayerDropCallback(layers_to_freeze="1-3")  # type: ignore[arg-type]
    with caplog.at_level("INFO", logger="hf_compress"):
        Trainer(
            bert(), arguments(tmp_path), train_dataset=data, callbacks=[LayerDropCallback(freeze_embeddings=True, layers_to_freeze=[2, 1])]
        )
    assert caplog.text.count("frozen: embeddings and layers 1-2 of the full model") == 1


def test_a_model_dropped_before_is_compared_with_the_checkpoint_at_once(tmp_path: Path, data: Dataset) -> None:
    Trainer(bert(), arguments(tmp_path), train_dataset=data, callbacks=[LayerDropCallback("top")]).train()
    model = bert()
    drop_layers(model, strategy="bottom")
    args = arguments(tmp_path, resume_from_checkpoint=str(tmp_path / "checkpoint-1"))
    with pytest.raises(LayerDropError, match=r"kept layers 1-4 of 6, and the model of this run kept layers 3-6 of 6"):
        Trainer(model, args, train_dataset=data, callbacks=[LayerDropCallback("bottom")])
