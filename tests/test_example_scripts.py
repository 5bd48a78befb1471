"""Scripts in the manner of transformers' own examples, which know nothing of hf_compress, with a teacher and fewer layers."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file

from hf_compress.run import main
from tests.example_data import SCRIPTS, TASKS, TRAINING, Task, write_files, write_model
from tests.tiny_text import WORDS, tokenizer

TOP = ("--layer_drop_strategy", "top", "--num_layers_to_drop", "2")


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


# The heads of several shapes; of the others the test below compares the values.
ITSELF = [pytest.param(name, marks=[] if name in ("ner", "qa", "swag", "mlm", "translation") else pytest.mark.slow) for name in TASKS]


@pytest.mark.parametrize("name", ITSELF)
def test_who_learns_from_itself_has_nothing_to_learn(name: str, tmp_path: Path) -> None:
    """Both read the same, so every part is 0: inputs, decoder inputs, choices and padding are the same on both sides."""
    run = Run(TASKS[name], tmp_path)
    run.model = run.teacher
    padded = () if run.task.script == "run_lm.py" else ("--pad_to_max_length", "True")
    assert main([*run.flags(*padded, "--max_steps", "1", "--save_strategy", "no"), *run.distilled()]) == 0
    parts = {part: value for part, value in run.steps[0].items() if part.startswith("loss_")}
    assert parts.keys() >= {"loss_logits", "loss_hidden_states", "loss_attention_scores"}
    assert max(parts.values()) < 1e-6, parts


def bernoulli(student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
    """Each label by itself: the mean over the labels of T^2 * KL, at T = 2."""
    p, q = (teacher / 2).sigmoid(), (student / 2).sigmoid()
    return 4 * (p * (p / q).log() + (1 - p) * ((1 - p) / (1 - q)).log()).mean(-1)


def categorical(student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
    p, q = (teacher / 2).softmax(-1), (student / 2).softmax(-1)
    return 4 * (p * (p / q).log()).sum(-1)


def squared(student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
    return (student - teacher).pow(2).mean(-1)


BY_HAND: dict[str, tuple[str, Callable[[torch.Tensor, torch.Tensor], torch.Tensor]]] = {
    "multi_label": ("AutoModelForSequenceClassification", bernoulli),
    "regression": ("AutoModelForSequenceClassification", squared),
    "xnli": ("AutoModelForSequenceClassification", categorical),
    "ner": ("AutoModelForTokenClassification", categorical),
    "swag": ("AutoModelForMultipleChoice", categorical),
}


@pytest.mark.parametrize("name", BY_HAND)
def test_what_is_compared_is_what_the_task_means(name: str, tmp_path: Path) -> None:
    """The first step's loss, from two plain models and all the texts of the file in one batch."""
    auto_model, formula = BY_HAND[name]
    run = Run(replace(TASKS[name], begins_with=None), tmp_path)
    assert main([*run.flags("--per_device_train_batch_size", str(TRAINING), "--do_predict", "False", steps=1), *run.distilled(*TOP)]) == 0
    student, teacher = (getattr(transformers, auto_model).from_pretrained(path) for path in (run.model, run.teacher))
    student.bert.encoder.layer = student.bert.encoder.layer[:2]
    rows = [json.loads(line) for line in (tmp_path / "train.json").read_text().splitlines()]
    endings = [[(row["sent1"], row[f"ending{n}"]) for n in range(4)] for row in rows] if name == "swag" else []
    texts = [pair for group in endings for pair in group] or [
        (row["premise"], row["hypothesis"]) if name == "xnli" else row["sentence"] if "sentence" in row else " ".join(row["tokens"])
        for row in rows
    ]
    batch = tokenizer()(texts, padding=True, return_tensors="pt")
    words = batch["input_ids"] > WORDS.index("[MASK]")
    if name == "swag":
        batch = {key: value.view(len(rows), 4, -1) for key, value in batch.items()}
    with torch.no_grad():
        values = formula(student(**batch).logits, teacher(**batch).logits)
    expected = (values[words] if name == "ner" else values).mean().item()
    assert expected > 1e-6
    assert run.steps[0]["loss_logits"] == pytest.approx(expected, rel=1e-3)


def test_a_trainer_from_beside_the_script_is_this_runs_own(tmp_path: Path) -> None:
    """As run_qa.py imports trainer_qa.py: the second run in a process must not find the first one's."""
    run = Run(TASKS["qa"], tmp_path)
    assert main([*run.flags(out="first", steps=1), "--layers_to_drop", "1"]) == 0
    assert main([*run.flags(out="second", steps=1), "--layers_to_drop", "3,4"]) == 0
    assert run.config.num_hidden_layers == 2
    assert "trainer_qa" not in sys.modules


def test_the_plain_distilling_trainer_stands_behind_seq2seq_as_well(tmp_path: Path) -> None:
    run = Run(TASKS["summarization"], tmp_path)
    assert main([*run.flags(), *run.distilled(*TOP, trainer="DistillTrainer")]) == 0
    assert run.steps[0]["loss_logits"] > 0 and "eval_gen_len" in run.results


def test_data_that_comes_one_after_the_other(tmp_path: Path) -> None:
    run = Run(TASKS["clm"], tmp_path)
    assert main([*run.flags("--streaming", "True"), *run.distilled(*TOP)]) == 0
    assert run.steps[0]["loss_logits"] > 0 and "eval_accuracy" in run.results


REFUSED: dict[str, tuple[str, list[str], str]] = {
    "a_trainer_that_generates": ("ner", ["--trainer_class", "Seq2SeqDistillTrainer"], "needs Seq2SeqTrainingArguments"),
    "masks_drawn_anew": ("mlm", ["--teacher_cache_dir", "cache"], "makes other inputs of the same examples each time"),
    "two_texts_an_example": ("summarization", ["--teacher_cache_dir", "cache"], "has several stacks of layers (encoder, decoder)"),
    "an_endless_file": ("clm", ["--teacher_cache_dir", "cache", "--streaming", "True"], "has no length"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_is_one_line(case: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    name, flags, words = REFUSED[case]
    monkeypatch.chdir(tmp_path)
    run = Run(TASKS[name], tmp_path)
    assert main([*run.flags(), *run.distilled(*TOP), *flags]) == 2
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith(("hf-compress: error:", "Traceback"))]
    assert len(errors) == 1 and words in errors[0], errors
    assert not (tmp_path / "cache").exists()


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name, task in TASKS.items() if name != "mlm" and task.trainer == "DistillTrainer"])
def test_the_teacher_on_disk_teaches_the_same(name: str, tmp_path: Path) -> None:
    run = Run(TASKS[name], tmp_path)
    stored = ("--teacher_cache_dir", str(tmp_path / "cache"))
    assert main([*run.flags(out="live"), *run.distilled(*TOP)]) == 0
    live, weights = run.steps, run.weights(run.out)
    assert main([*run.flags(out="built"), *run.distilled(*TOP, *stored, "--teacher_cache_dtype", "float32")]) == 0
    for folder in ("built", "read"):
        if folder == "read":
            assert main([*run.flags(out="read"), *run.distilled(*TOP, *stored, teacher=False)]) == 0
        for one, other in zip(live, run.steps, strict=True):
            parts = [part for part in one if part.startswith("loss")]
            assert {part: one[part] for part in parts} == pytest.approx({part: other[part] for part in parts}, rel=1e-3)
        assert all(torch.allclose(value, weights[key], atol=1e-3) for key, value in run.weights(run.out).items())
