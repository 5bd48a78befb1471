"""What hf_compress says on the console: from Python, and under `hf-compress run`, once."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from hf_compress.console_log import console_log, show_log

ROOT = Path(__file__).parents[1]
LOGGER = logging.getLogger("hf_compress")


@pytest.fixture(autouse=True)
def fresh_loggers(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """As in a process that has done nothing about logging."""
    monkeypatch.setattr(LOGGER, "handlers", [])
    level = LOGGER.level
    LOGGER.setLevel(logging.NOTSET)
    yield
    LOGGER.setLevel(level)


@pytest.fixture
def bare_root(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """To be called in the test: pytest puts its own handlers on the root logger just before that."""
    return lambda: monkeypatch.setattr(logging.getLogger(), "handlers", [])


def test_the_first_call_shows_the_log_and_the_second_changes_nothing(
    capsys: pytest.CaptureFixture[str], bare_root: Callable[[], None]
) -> None:
    bare_root()
    show_log()
    show_log()
    logging.getLogger("hf_compress.layers.drop").info("kept 1-2")
    assert capsys.readouterr().err == "hf_compress.layers.drop: kept 1-2\n"


def test_other_processes_only_warn(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, bare_root: Callable[[], None]
) -> None:
    bare_root()
    monkeypatch.setenv("RANK", "1")
    show_log()
    LOGGER.info("kept")
    LOGGER.warning("beware")
    assert capsys.readouterr().err == "hf_compress: beware\n"


def test_a_scripts_own_settings_stay(capsys: pytest.CaptureFixture[str]) -> None:
    own = logging.NullHandler()
    LOGGER.setLevel(logging.ERROR)
    LOGGER.addHandler(own)
    show_log()
    assert (LOGGER.level, LOGGER.handlers) == (logging.ERROR, [own])


@pytest.mark.parametrize("first", ["script", "hf_compress"])
def test_a_root_handler_shows_each_line_once(capsys: pytest.CaptureFixture[str], first: str, bare_root: Callable[[], None]) -> None:
    bare_root()
    for step in (first, "script", "hf_compress"):
        if step == "script":
            logging.basicConfig(format="ROOT %(message)s")
        else:
            show_log()
    LOGGER.info("kept")
    assert capsys.readouterr().err == "ROOT kept\n"


def test_while_a_script_runs_each_line_is_shown_once(capsys: pytest.CaptureFixture[str], bare_root: Callable[[], None]) -> None:
    bare_root()
    show_log()
    before = (LOGGER.level, list(LOGGER.handlers), LOGGER.propagate)
    with console_log():
        logging.basicConfig(format="ROOT %(message)s")
        show_log()
        LOGGER.info("kept")
    assert capsys.readouterr().err == "hf_compress: kept\n"
    assert (LOGGER.level, LOGGER.handlers, LOGGER.propagate) == before


@pytest.mark.slow
def test_python_use_says_what_was_kept_and_compared(tmp_path: Path) -> None:
    script = """
from transformers import Trainer
from hf_compress import DistillTrainer, LayerDropCallback, LogitsLoss
from tests.tiny_runs import arguments, rows, student, teacher
from pathlib import Path
Trainer(student(), arguments(Path("a")), callbacks=[LayerDropCallback("top", freeze_embeddings=True)])
DistillTrainer(student(), arguments(Path("b")), teacher=teacher(), losses=[LogitsLoss()], train_dataset=rows()).train()
"""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", script], cwd=tmp_path, env=environment, capture_output=True, text=True, check=True)
    for line in ("kept 1 of 2, dropped 2", "frozen: embeddings", "loss: "):
        assert done.stderr.count(line) == 1, done.stderr
