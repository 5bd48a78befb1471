"""Where people see what hf_compress logs: which layers were kept, the losses, the teacher's own score. On the first process only.

Python            show_log(): a level, and a handler where nobody has one; whoever set either keeps it
hf-compress run   console_log(): both, whatever the script does about logging, and all as it was afterwards
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TextIO

NAME = "hf_compress"


class _Console(logging.StreamHandler[TextIO]):
    """Writes to stderr until the root logger has a handler of its own, which then shows the same lines."""

    def __init__(self) -> None:
        super().__init__()
        self.setFormatter(logging.Formatter("%(name)s: %(message)s"))

    def emit(self, record: logging.LogRecord) -> None:
        """Write the line, unless the root logger shows it."""
        if not (logging.getLogger(NAME).propagate and logging.getLogger().handlers):
            super().emit(record)


def show_log() -> None:
    """Let people who call from Python see the log, as transformers does with its own; calling it again changes nothing."""
    logger = logging.getLogger(NAME)
    if logger.level == logging.NOTSET:
        logger.setLevel(_level())
    if not logger.handlers and not logging.getLogger().handlers:
        logger.addHandler(_Console())


@contextmanager
def console_log() -> Iterator[None]:
    """Show the log once, whatever the script that runs meanwhile does about logging."""
    logger = logging.getLogger(NAME)
    level, propagate, handlers = logger.level, logger.propagate, list(logger.handlers)
    handler = _Console()
    logger.handlers[:] = [each for each in handlers if not isinstance(each, _Console)] + [handler]
    logger.setLevel(_level())
    logger.propagate = False  # else a script's own root handler would show each line again
    try:
        yield
    finally:
        logger.handlers[:] = handlers
        logger.setLevel(level)
        logger.propagate = propagate


def _level() -> int:
    """Launchers number their processes before they start them."""
    return logging.INFO if os.environ.get("RANK", "0") == "0" else logging.WARNING
