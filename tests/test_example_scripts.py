"""Scripts in the manner of transformers' own examples, which know nothing of hf_compress, with a teacher and fewer layers."""

from __future__ import annotations

import importlib
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file

from hf_compress.run import main
from tests.example_data import SCRIPTS, TASKS, Task, write_files, write_model

TOP = ("--layer_drop_strategy", "top", "--num_layers_to_drop", "2")


@pytest.fixture(autouse=True)
def modules_beside_the_scripts() -> Iterator[None]:
    """A script is a process of its own: what it imports from beside it is imported anew by the next."""
    importlib.import_module("transformers.trainer_seq2seq")
    yield
    for name in ("trainer_qa", "example_parts"):
        sys.modules.pop(name, None)


class Run:
    """One run of a task's script, and what it left."""

    def __init__(self, task: Task, folder: Path) -> None:
        self.task, self.folder, self.out = task, folder, folder / "out"
        self.files = write_files(task, folder)
        self.model = write_model(task, folder / "model", teacher=False)
        self.teacher = write_model(task, folder / "teacher", teacher=True)

    def flags(self, *more: str, out: str = "out", steps: int = 2) -> list[str]:
        self.out = self.folder / out
        return [
            *(str(SCRIPTS / self.task.script), "--model_name_or_path", self.model, "--output_dir", str(self.out), *self.files),
            *("--do_train", "True", "--do_eval", "True", "--use_cpu", "True", "--max_steps", str(steps), "--logging_steps", "1"),
            *("--per_device_train_batch_size", "4", "--learning_rate", "1e-2", "--disable_tqdm", "True", "--report_to", "none"),
            *("--save_strategy", "no", *self.task.flags, *more),
        ]

    def distilled(self, *more: str, trainer: str | None = None, teacher: bool = True) -> list[str]:
        from_teacher = ("--teacher_model_name_or_path", self.teacher) if teacher else ()
        return ["--trainer_class", trainer or self.task.trainer, *from_teacher, *more]

    @property
    def steps(self) -> list[dict[str, float]]:
        history = json.loads((self.out / "trainer_state.json").read_text())["log_history"]
        return [entry for entry in history if "loss" in entry]

    @property
    def results(self) -> dict[str, Any]:
        results: dict[str, Any] = json.loads((self.out / "all_results.json").read_text())
        return results

    @property
    def config(self) -> Any:
        return transformers.AutoConfig.from_pretrained(self.out)

    def weights(self, folder: Path | str) -> dict[str, torch.Tensor]:
        """Without the name that a model with a head gives to the one inside it."""
        return {key.removeprefix("bert."): value for key, value in load_file(Path(folder) / "model.safetensors").items()}


def test_there_is_a_script_for_every_head() -> None:
    assert {task.script for task in TASKS.values()} == {path.name for path in SCRIPTS.glob("run_*.py")}


@pytest.mark.parametrize("name", TASKS)
def test_a_script_distils_into_fewer_layers(name: str, tmp_path: Path) -> None:
    run = Run(TASKS[name], tmp_path)
    assert main([*run.flags("--do_predict", "True"), *run.distilled(*TOP)]) == 0
    stacks = ("", "_decoder") if run.config.is_encoder_decoder else ("",)
    for entry in run.steps:
        parts = ["loss_logits", *(f"loss_{part}{stack}" for part in ("hidden_states", "attention_scores") for stack in stacks)]
        assert all(entry[part] > 0 for part in parts), entry
        assert entry["loss"] == pytest.approx(sum(10 * entry[p] if "hidden" in p else entry[p] for p in parts), rel=2e-3)
    assert len(run.steps) == 2
    assert (f"teacher_{run.task.metric}" in run.steps[0]) == run.task.scored
    assert {f"eval_{run.task.metric}", "eval_loss", "eval_samples"} <= run.results.keys()
    assert {path.name for path in run.out.iterdir()} >= {"README.md", "model.safetensors", "eval_results.json", "train_results.json"}
    depths = {"t5": ("num_layers", "num_decoder_layers"), "bart": ("encoder_layers", "decoder_layers")}
    assert [getattr(run.config, depth) for depth in depths.get(run.task.architecture, ("num_hidden_layers",))] == [2] * len(stacks)
    before, after = run.weights(run.model), run.weights(run.out)
    assert max(int(part) for key in after for part in key.split(".") if part.isdigit()) < 4
    moved = [key for key, value in after.items() if key in before and not torch.equal(value, before[key])]
    assert len(moved) > len(after) / 2


@pytest.mark.parametrize("name", TASKS)
def test_who_learns_from_itself_has_nothing_to_learn(name: str, tmp_path: Path) -> None:
    """Both read the same, so every part is 0: inputs, decoder inputs, choices and padding are the same on both sides."""
    run = Run(TASKS[name], tmp_path)
    run.model = run.teacher
    padded = () if run.task.script == "run_lm.py" else ("--pad_to_max_length", "True")
    assert main([*run.flags(*padded, "--max_steps", "1", "--save_strategy", "no"), *run.distilled()]) == 0
    parts = {part: value for part, value in run.steps[0].items() if part.startswith("loss_")}
    assert parts.keys() >= {"loss_logits", "loss_hidden_states", "loss_attention_scores"}
    assert max(parts.values()) < 1e-6, parts
