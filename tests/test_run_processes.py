"""`hf-compress run` in processes of its own, as people and launchers start it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.tiny_models import tiny_model
from tests.training_scripts import read_report, training_flags, write_script

ROOT = Path(__file__).parents[1]
TOP = ("--layer_drop_strategy", "top", "--num_layers_to_drop", "2")


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A teacher of the vocabulary and the labels of the scripts' own model."""
    folder = tmp_path_factory.mktemp("teacher")
    torch.manual_seed(3)
    tiny_model("bert", num_layers=4).save_pretrained(folder)
    return str(folder)


def start(folder: Path, *arguments: str, module: str = "hf_compress.run") -> subprocess.CompletedProcess[str]:
    """Run it as a launcher would, from another folder."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.run(
        [sys.executable, "-m", module, *arguments], cwd=folder, env=environment, capture_output=True, text=True, timeout=300, check=False
    )


@pytest.mark.slow
def test_started_as_a_module_after_a_launchers_flag(tmp_path: Path) -> None:
    script = write_script(tmp_path, "seq2seq")
    result = start(tmp_path, "--local_rank=0", str(script), *TOP, *training_flags(tmp_path))
    assert result.returncode == 0, result.stderr
    report = read_report(tmp_path)
    assert report["argv"][1] == "--local_rank=0"
    assert report["kept"] == [1, 2]
    assert "kept 1-2 of 4, dropped 3-4" in result.stderr


def test_an_exit_code_passes_through_a_process(tmp_path: Path) -> None:
    (tmp_path / "leaves.py").write_text("import sys\nsys.exit(3)\n")
    result = start(tmp_path, "leaves.py")
    assert result.returncode == 3
    assert result.stderr == "hf-compress: note: no flag of hf_compress was given, so leaves.py runs as it is.\n"


@pytest.mark.slow
@pytest.mark.parametrize(("name", "distil"), [("attribute", False), ("from_module", False), ("subclass", True), ("seq2seq", True)])
def test_scripts_in_a_process_of_their_own(tmp_path: Path, teacher: str, name: str, distil: bool) -> None:
    flags = ["--trainer_class", "DistillTrainer", "--teacher_model_name_or_path", teacher] if distil else []
    result = start(
        tmp_path, "run", str(write_script(tmp_path, name)), *training_flags(tmp_path), *TOP, *flags, module="hf_compress.cli.app"
    )
    assert result.returncode == 0, result.stderr
    report = read_report(tmp_path)
    assert report["kept"] == [1, 2]
    assert ("hf_compress.trainer.DistillTrainer" in report["trainers"]) == distil


@pytest.mark.slow
def test_errors_in_a_process_of_their_own(tmp_path: Path) -> None:
    refused = start(tmp_path, str(write_script(tmp_path)), *training_flags(tmp_path), "--layers_to_drop", "9")
    assert refused.returncode == 2
    assert "Traceback" not in refused.stderr
    (tmp_path / "breaks.py").write_text("def inner():\n    raise KeyError('from the script')\ninner()\n")
    broken = start(tmp_path, "breaks.py")
    assert broken.returncode == 1
    assert "KeyError: 'from the script'" in broken.stderr
    assert "in inner" in broken.stderr


@pytest.mark.slow
def test_a_script_finds_the_modules_beside_it(tmp_path: Path) -> None:
    script = write_script(tmp_path, "subclass")
    (script.parent / "beside_it.py").write_text("from transformers import Trainer\nclass OwnTrainer(Trainer):\n    pass\n")
    before, _, body = script.read_text().partition("\nimport json\n")
    assert "class OwnTrainer" in before
    script.write_text("from beside_it import OwnTrainer\nimport json\n" + body)
    result = start(tmp_path, str(script), *training_flags(tmp_path), *TOP)
    assert result.returncode == 0, result.stderr
    assert read_report(tmp_path)["kept"] == [1, 2]
    assert read_report(tmp_path)["trainers"][0] == "beside_it.OwnTrainer"


@pytest.mark.slow
def test_torchrun_starts_it_on_two_processes(tmp_path: Path) -> None:
    arguments = [
        "--standalone",
        "--nproc_per_node",
        "2",
        "-m",
        "hf_compress.run",
        str(write_script(tmp_path)),
        *training_flags(tmp_path),
        *TOP,
    ]
    result = start(tmp_path, *arguments, module="torch.distributed.run")
    assert result.returncode == 0, result.stderr
    assert read_report(tmp_path)["kept"] == [1, 2]
    assert result.stderr.count("kept 1-2 of 4, dropped 3-4") == 1


@pytest.mark.slow
def test_accelerate_starts_it(tmp_path: Path) -> None:
    arguments = ["launch", "--cpu", "--num_processes", "1", "-m", "hf_compress.run", str(write_script(tmp_path)), *training_flags(tmp_path)]
    result = start(tmp_path, *arguments, *TOP, module="accelerate.commands.accelerate_cli")
    assert result.returncode == 0, result.stderr
    assert read_report(tmp_path)["kept"] == [1, 2]


@pytest.mark.slow
def test_the_packaged_glue_script_shows_both_helps(tmp_path: Path) -> None:
    result = start(tmp_path, "run", "glue", "--help", module="hf_compress.cli.app")
    assert result.returncode == 0, result.stderr
    assert 0 < result.stdout.index("--layer_drop_strategy") < result.stdout.index("--task_name")


@pytest.mark.slow
def test_the_example_takes_our_flags_itself(tmp_path: Path) -> None:
    command = [sys.executable, str(ROOT / "examples" / "run_glue.py")]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    flags = ["--model_name_or_path", "x", "--task_name", "mrpc", "--output_dir", str(tmp_path / "out"), "--distill_recipe", "tinybret"]
    refused = subprocess.run([*command, *flags], cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert refused.returncode == 1
    assert "Did you mean 'tinybert'?" in refused.stderr
    assert list(tmp_path.iterdir()) == []
