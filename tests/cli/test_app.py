"""`hf-compress`: its commands, and that help waits for nothing."""

from __future__ import annotations

import resource
import subprocess
import sys
from pathlib import Path

import pytest

import hf_compress
from hf_compress.cli.app import COMMANDS, main

ROOT = Path(__file__).parents[2]


def test_help_comes_within_a_second_and_loads_nothing_heavy() -> None:
    code = (
        "import sys\nfrom hf_compress.cli.app import main\ncode = main(['--help'])\n"
        "print('loaded', *sorted({'torch', 'transformers', 'numpy', 'datasets', 'rich', 'typer'} & set(sys.modules)))\nsys.exit(code)"
    )
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    # Processor time: it waits for nothing, and what else the machine does must not count.
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 1.0
    assert result.stdout.splitlines()[-1] == "loaded"
    for command in COMMANDS:
        assert f"  {command}" in result.stdout


@pytest.mark.parametrize("command", ["run", "student", "drop", "demo"])
def test_a_commands_help_loads_no_torch(command: str) -> None:
    code = (
        f"import sys\nfrom hf_compress.cli.app import main\ntry:\n    main(['{command}', '--help'])\nexcept SystemExit:\n    pass\n"
        "print('loaded', *sorted({'torch', 'transformers', 'numpy', 'datasets'} & set(sys.modules)))"
    )
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert result.stdout.splitlines()[-1] == "loaded"
    assert f"hf-compress {command}" in result.stdout


def test_the_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["version"]) == 0
    assert main(["--version"]) == 0
    assert capsys.readouterr().out.split() == [hf_compress.__version__] * 2


def test_no_command_shows_the_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 2
    assert "usage: hf-compress COMMAND" in capsys.readouterr().out


def test_an_unknown_command_is_an_error_with_the_nearest(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["studnet"]) == 2
    assert "no command 'studnet'. Did you mean 'student'?" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["student"], "TEACHER"),
        (["student", "teacher"], "output_dir"),
        (["student", "teacher", "-o", "out", "--hidden_size", "wide"], "invalid int value: 'wide'"),
        (["student", "teacher", "-o", "out", "--layers_to_keep", "0"], "no layer 0"),
        (["student", "nowhere/teacher", "-o", "out", "--num_hidden_layers", "2"], "There is no model in nowhere/teacher"),
        (["drop", "model", "-o", "out"], "Say which layers to drop"),
        (["drop", "model", "-o", "out", "--strategy", "tip"], "Did you mean 'top'?"),
        (["drop", "model", "-o", "out", "--strategy", "contribution"], "measures layers on examples"),
        (["drop", "model", "-o", "out", "--strategie", "top"], "unrecognized arguments: --strategie top"),
        (["demo", "--scale", "short"], "invalid float value: 'short'"),
        (["run"], "No script was named"),
    ],
)
def test_errors_are_one_line_and_leave_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], arguments: list[str], words: str
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(arguments) == 2
    shown = capsys.readouterr().err
    assert shown.startswith("hf-compress: error: ")
    assert shown.count("\n") == 1
    assert words in shown
    assert list(tmp_path.iterdir()) == []


def test_an_error_shows_its_traceback_if_asked(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["drop", "model", "-o", "out", "--strategy", "tip", "--traceback"]) == 2
    assert "Traceback" in capsys.readouterr().err
