"""FSDP2 on two processes learns what one process does: the Trainer itself runs, with the student's parameters split.

Two ways lead there, and both run on the CPU: a student that transformers splits while it is loaded (`distributed_config`), and one that
accelerate splits (`--fsdp`), which has to be talked into it, since it takes a CPU for DDP.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from hf_compress.arguments import CompressionArguments
from hf_compress.errors import ArgumentError
from hf_compress.losses.logits import LogitsLoss
from hf_compress.trainer import DistillTrainer
from tests.equal_runs import agree, gradient_and_weights
from tests.launching import launch
from tests.tiny_models import tiny_model
from tests.tiny_runs import NARROW, arguments, largest_difference, rows, student, teacher

SCRIPT = """
import os, sys
from pathlib import Path
import torch
from accelerate import PartialState
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin
from safetensors.torch import save_file
from transformers import AutoModelForSequenceClassification, TrainingArguments
from transformers.distributed import DistributedConfig
from hf_compress.errors import ArgumentError
from hf_compress.trainer import DistillTrainer
from tests.equal_runs import gradient_and_weights
from tests.tiny_runs import teacher

folder, rank = Path(sys.argv[1]), int(os.environ["RANK"])
torch.set_num_threads(1)
TrainingArguments(str(folder), use_cpu=True).device  # joins the processes


def run(name, guide=None, **more):
    found = gradient_and_weights(folder / name, guide or teacher(), batch_size=8, **more)
    save_file({key: value.contiguous() for key, value in found.items()}, folder / f"{name}-{rank}.safetensors")


def split(name):
    config = DistributedConfig(fsdp_size=2, fsdp_plan={"bert.encoder.layer.*": "free_full_weight"})
    model = AutoModelForSequenceClassification.from_pretrained(folder / name, distributed_config=config)
    assert all(type(p).__name__ == "DTensor" for p in model.parameters())
    return model


run("split by transformers", model=split("student"))
run("phases", model=split("student"), flags={"distill_phases": "intermediate=2,prediction=2"}, max_steps=-1)
run("layers dropped", model=split("deep student"), flags={"layer_drop_strategy": "contribution", "num_layers_to_drop": 2})


class SplitByAccelerate(DistillTrainer):
    first_loads = False

    def create_accelerator_and_postprocess(self):
        super().create_accelerator_and_postprocess()
        PartialState().distributed_type = self.accelerator.state.distributed_type = DistributedType.FSDP
        self.accelerator.state.fsdp_plugin = plugin = FullyShardedDataParallelPlugin(
            fsdp_version=2, auto_wrap_policy="transformer_based_wrap", transformer_cls_names_to_wrap="BertLayer",
            state_dict_type="FULL_STATE_DICT",
        )
        plugin.cpu_ram_efficient_loading = self.first_loads
        self.is_fsdp_enabled = True


adam = {"optim": "adamw_torch", "adam_epsilon": 1e-4, "weight_decay": 0.01, "save_strategy": "steps", "save_steps": 10}
run("split by accelerate", trainer_class=SplitByAccelerate)
run("unbroken", trainer_class=SplitByAccelerate, **adam)
run("resumed", trainer_class=SplitByAccelerate, resume=folder / "unbroken" / "checkpoint-10", **adam)

SplitByAccelerate.first_loads = True
run("loaded on the first", str(folder / "teacher"), trainer_class=SplitByAccelerate)

# What a checkpoint lacks, a new head here, is made by the first process alone.
settings = {"ACCELERATE_USE_FSDP": "true", "FSDP_CPU_RAM_EFFICIENT_LOADING": "true"}
os.environ.update(settings)
bare = AutoModelForSequenceClassification.from_pretrained(folder / "bare student")
assert bare.classifier.weight.is_meta == (rank == 1)
for name in settings:  # with which accelerate refuses a CPU
    del os.environ[name]
drop = {"layer_drop_strategy": "contribution", "num_layers_to_drop": 2}
try:
    run("refused", str(folder / "teacher"), model=bare, flags=drop, trainer_class=SplitByAccelerate)
except ArgumentError as error:
    assert bare.config.num_hidden_layers == 2  # measured on the first alone
    (folder / f"refused-{rank}").write_text(str(error))
"""


DROP = {"layer_drop_strategy": "contribution", "num_layers_to_drop": 2}


@pytest.fixture(scope="module")
def split(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("split")
    student(**NARROW).save_pretrained(folder / "student")
    tiny_model("bert", num_layers=4, seed=2, **NARROW).save_pretrained(folder / "deep student")
    tiny_model("bert", num_layers=4, seed=2, **NARROW).bert.save_pretrained(folder / "bare student")
    teacher().save_pretrained(folder / "teacher")
    launch(folder, SCRIPT)
    return folder


def of_ranks(folder: Path, name: str) -> list[dict[str, Tensor]]:
    return [load_file(folder / f"{name}-{rank}.safetensors") for rank in range(2)]


@pytest.mark.slow
def test_gradient_and_weights_are_those_of_one_process(split: Path, tmp_path: Path) -> None:
    one = gradient_and_weights(tmp_path, teacher(), batch_size=16)
    for name in ("split by transformers", "split by accelerate", "loaded on the first"):
        for found in of_ranks(split, name):
            agree(one, found)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "flags", "depth"),
    [
        ("phases", {"distill_phases": "intermediate=2,prediction=2"}, 2),
        ("layers dropped", DROP, 4),
    ],
)
def test_phases_and_dropped_layers(split: Path, tmp_path: Path, name: str, flags: dict[str, object], depth: int) -> None:
    model = tiny_model("bert", num_layers=depth, seed=2, **NARROW)
    before = {key: value.clone() for key, value in model.named_parameters()}
    steps = {"max_steps": -1} if name == "phases" else {}
    one = gradient_and_weights(tmp_path, teacher(), model=model, flags=flags, batch_size=16, **steps)
    for found in of_ranks(split, name):
        assert largest_difference(one, found) < 1e-5
    moved = {key: (value - before[key]).abs().max().item() for key, value in one.items() if key in before and ".layer." not in key}
    assert min(moved.values()) > 1e-5 and max(moved.values()) > 1e-3


@pytest.mark.slow
def test_a_resumed_run_ends_where_an_unbroken_one_does(split: Path) -> None:
    for unbroken, resumed in zip(of_ranks(split, "unbroken"), of_ranks(split, "resumed"), strict=True):
        own = {name: value for name, value in unbroken.items() if not name.startswith("gradient.")}
        assert largest_difference(own, resumed) < 1e-6
        assert any("projections" in name for name in own)


@pytest.mark.slow
def test_what_is_saved_is_whole_and_plain(split: Path) -> None:
    for name in ("split by transformers", "split by accelerate"):
        trained = of_ranks(split, name)[0]
        saved = load_file(split / name / "saved" / "model.safetensors")
        assert saved.keys() == dict(student(**NARROW).named_parameters()).keys()
        assert all(torch.equal(saved[key], trained[key]) for key in saved)
        projections = load_file(split / name / "saved" / "distill_projections.safetensors")
        assert projections and all(torch.equal(value, trained[f"hf_compress_projections.{key}"]) for key, value in projections.items())


@pytest.mark.slow
def test_a_head_that_is_empty_on_one_process_is_refused_on_both(split: Path) -> None:
    first, second = ((split / f"refused-{rank}").read_text() for rank in range(2))
    assert first == second
    assert "classifier.weight, classifier.bias" in first and "cpu_ram_efficient_loading" in first


def test_fsdp_on_the_cpu_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with pytest.raises(ArgumentError, match="on the CPU, where the Trainer passes over it and trains as DDP"):
        DistillTrainer(student(), arguments(tmp_path), teacher=teacher(), losses=[LogitsLoss()], train_dataset=rows())


def test_the_old_fsdp_is_refused(tmp_path: Path) -> None:
    trainer = DistillTrainer(student(), arguments(tmp_path), teacher=teacher(), losses=[LogitsLoss()])
    trainer.accelerator.state.fsdp_plugin = type("Plugin", (), {"fsdp_version": 1})()
    trainer.train_dataset = rows()
    try:
        with pytest.raises(ArgumentError, match="FSDP1 is asked for"):
            trainer.train()
    finally:
        trainer.accelerator.state.fsdp_plugin = None
    assert isinstance(trainer.compression, CompressionArguments)
