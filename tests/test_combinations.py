"""Features that were made by themselves, together: what one says must reach the other."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import nn
from transformers import TrainerCallback

from hf_compress.arguments import CompressionArguments
from hf_compress.chunked_logits import ChunkSettings, has_plain_label_loss
from hf_compress.deepspeed_configs import LAUNCHED, check_launched
from hf_compress.errors import ArgumentError, CacheError, LossError
from hf_compress.losses.hidden_states import HiddenStatesLoss
from hf_compress.losses.labels import LabelsLoss
from hf_compress.losses.logits import LogitsLoss
from hf_compress.trainer import DistillTrainer
from tests.cached_runs import data, tokenizer
from tests.tiny_models import tiny_model
from tests.tiny_runs import arguments, rows, student, teacher, weights
from tests.tiny_search import install


def deep(seed: int) -> Any:
    return tiny_model("bert", num_layers=6, seed=seed)


class Compared(TrainerCallback):
    """Notes, at each step, how deep the student is and what is compared."""

    def __init__(self) -> None:
        self.trainer: DistillTrainer | None = None
        self.seen: set[tuple[int, str]] = set()

    def on_step_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        assert self.trainer is not None and self.trainer.distillation is not None
        self.seen.add((model.config.num_hidden_layers, str(self.trainer.distillation.active[0])))


def test_a_trials_own_layers_go_and_its_losses_follow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, [{"num_layers_to_drop": 2}])
    watch = Compared()
    watch.trainer = trainer = DistillTrainer(
        args=arguments(tmp_path, max_steps=-1, num_train_epochs=2),
        model_init=lambda: deep(2),
        teacher=deep(1),
        compression=CompressionArguments(layer_drop_strategy="bottom", num_layers_to_drop=1, layer_drop_after_epochs=1),
        losses=[HiddenStatesLoss(pairs="middle")],
        train_dataset=rows(),
        eval_dataset=rows(),
        callbacks=[watch],
    )
    space = {"hp_space": lambda trial: {name: trial.suggest(name) for name in trial.values}, "n_trials": 1, "backend": "optuna"}
    trainer.hyperparameter_search(compute_objective=lambda metrics: metrics["eval_loss"], **space)
    (before, after) = sorted(watch.seen, reverse=True)
    assert before[0] == 6 and "3:3" in before[1] and after[0] == 4 and "2:4" in after[1]


def test_a_model_that_is_built_anew_is_resumed_in_its_stage(tmp_path: Path) -> None:
    def run(**more: Any) -> DistillTrainer:
        trainer = DistillTrainer(
            args=arguments(tmp_path, max_steps=-1, num_train_epochs=3, save_strategy="epoch"),
            model_init=lambda: tiny_model("bert", num_layers=4, seed=2),
            teacher=tiny_model("bert", num_layers=4, seed=1),
            compression=CompressionArguments(layer_drop_strategy="top", num_layers_to_drop=2, layer_drop_every_n_epochs=1),
            losses=[LogitsLoss()],
            train_dataset=rows(),
        )
        trainer.train(**more)
        return trainer

    whole = weights(run())
    newest = max(tmp_path.glob("checkpoint-*"), key=lambda path: int(path.name.split("-")[1]))
    shutil.rmtree(newest)
    resumed = weights(run(resume_from_checkpoint=True))
    assert whole.keys() == resumed.keys()
    for name, tensor in whole.items():
        assert torch.allclose(tensor, resumed[name], atol=1e-6), name


def on_disk(folder: Path, guide: Any, **more: Any) -> DistillTrainer:
    flags = CompressionArguments(**{"teacher_cache_dir": str(folder / "cache"), "distill_recipe": "logits", **more})
    return DistillTrainer(
        student(), arguments(folder / "out"), teacher=guide, compression=flags, train_dataset=data(), processing_class=tokenizer()
    )


def test_a_path_given_in_python_must_be_of_the_teacher_on_disk(tmp_path: Path) -> None:
    for name, seed in (("a", 1), ("b", 9)):
        tiny_model("bert", num_layers=4, seed=seed).save_pretrained(tmp_path / name)
    on_disk(tmp_path, str(tmp_path / "a")).train()
    with pytest.raises(CacheError, match=r"teacher\.weights"):
        on_disk(tmp_path, str(tmp_path / "b"))
    on_disk(tmp_path, str(tmp_path / "a"), teacher_cache_miss="live")


def test_what_is_said_of_a_teacher_on_disk_is_not_about_a_live_one_beside_it(tmp_path: Path) -> None:
    guides = [teacher(), tiny_model("bert", num_layers=4, seed=9)]
    more = {"teacher_cache_dir": f"{tmp_path / 'cache'},", "distill_recipe": "layerwise"}

    def compared(**selected: str) -> list[str]:
        trainer = on_disk(tmp_path, guides, **more, **selected)
        assert trainer.distillation is not None
        return [str(loss) for loss in trainer.distillation.losses if loss.teacher == 2]

    whole = compared()
    assert any("attention_scores" in loss for loss in whole)
    assert compared(hidden_states_selection="1l_3t_0.5h") == compared(teacher_cache_budget="1MB") == whole


def test_layers_may_go_while_only_predictions_come_from_disk(tmp_path: Path) -> None:
    guides = [teacher(), tiny_model("bert", num_layers=4, seed=9)]
    trainer = DistillTrainer(
        tiny_model("bert", num_layers=4, seed=2),
        arguments(tmp_path / "out", max_steps=-1, num_train_epochs=2),
        teacher=guides,
        losses=[LogitsLoss(teacher=1), HiddenStatesLoss(teacher=2, layer_map="top")],
        compression=CompressionArguments(
            teacher_cache_dir=f"{tmp_path / 'cache'},", layer_drop_strategy="top", num_layers_to_drop=1, layer_drop_after_epochs=1
        ),
        train_dataset=data(),
        processing_class=tokenizer(),
    )
    trainer.train()
    assert trainer.model is not None and trainer.model.config.num_hidden_layers == 3


def test_a_teacher_whom_only_labels_name_is_refused(tmp_path: Path) -> None:
    guides = [teacher(), tiny_model("bert", num_layers=4, seed=9)]
    with pytest.raises(LossError, match="Teacher 2 of 2: no loss learns from it"):
        DistillTrainer(student(), arguments(tmp_path), teacher=guides, losses=[LogitsLoss(teacher=1), LabelsLoss()], train_dataset=rows())


def test_the_weights_of_one_teacher_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ArgumentError, match=r"there is one\. What the labels weigh .*--distill_weights labels"):
        CompressionArguments(teacher_model_name_or_path="my-bert", teacher_weights="0.7")


def test_a_checkpoint_that_is_not_there_is_refused_before_a_teacher_is_asked(tmp_path: Path) -> None:
    settings = arguments(tmp_path / "out", resume_from_checkpoint=str(tmp_path / "out" / "checkpoint-9"))
    with pytest.raises(ArgumentError, match=r"checkpoint-9: there is no such folder"):
        DistillTrainer(student(), settings, teacher=teacher(), train_dataset=rows())


def test_deepspeed_without_a_launcher_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in LAUNCHED:
        monkeypatch.delenv(name, raising=False)
    check_launched(None)
    with pytest.raises(ArgumentError, match="--deepspeed needs a launcher"):
        check_launched("zero2")
    monkeypatch.setenv("RANK", "0")
    check_launched("zero2")


class TwiceTheLoss(transformers.BertForMaskedLM):
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        outputs = super().forward(*args, **kwargs)
        outputs.loss = 2 * outputs.loss
        return outputs


def test_a_forward_of_ones_own_keeps_its_loss() -> None:
    config = tiny_model("bert", num_layers=1, head="masked_lm").config
    assert has_plain_label_loss(transformers.BertForMaskedLM(config)) and not has_plain_label_loss(TwiceTheLoss(config))


def test_a_head_that_is_never_called_is_left_whole() -> None:
    sizes = {"hidden_size": 16, "embedding_size": 8, "intra_bottleneck_size": 8, "intermediate_size": 16, "num_attention_heads": 2}
    model = transformers.MobileBertForMaskedLM(transformers.MobileBertConfig(vocab_size=9000, num_hidden_layers=1, **sizes))
    assert ChunkSettings().tokens(model) == 0


class TwoForwards(DistillTrainer):
    def compute_loss(self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        loss = super().compute_loss(model, inputs, *args, **kwargs)
        again = model(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"])["logits"]
        self.shape = again.shape
        return loss + 0.01 * again.square().mean()


def test_a_second_forward_of_a_scripts_own_makes_whole_logits(tmp_path: Path) -> None:
    lines = [{**row, "labels": row["input_ids"]} for row in rows().remove_columns("label")]
    learnt = []
    for chunk_size in (0, 7):
        trainer = TwoForwards(
            tiny_model("llama", num_layers=2, head="causal_lm", seed=2),
            arguments(tmp_path, max_steps=2),
            teacher=tiny_model("llama", head="causal_lm", seed=1),
            losses=[LogitsLoss(), LabelsLoss(weight=0.5)],
            compression=CompressionArguments(distill_logits_chunk_size=chunk_size),
            train_dataset=lines,
        )
        trainer.train()
        learnt.append((trainer.shape, weights(trainer)))
    assert learnt[0][0] == learnt[1][0] and learnt[0][0][1] > 1
    for name, tensor in learnt[0][1].items():
        assert torch.allclose(tensor, learnt[1][1][name], atol=1e-6), name
