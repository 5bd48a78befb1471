"""Scripts set levels of logging for their process; a test that runs one in its own puts them back."""

from __future__ import annotations

import logging
from collections.abc import Iterator

import pytest
from transformers.utils import logging as transformers_logging


@pytest.fixture(autouse=True)
def logging_as_it_was() -> Iterator[None]:
    """For a file of tests, by importing it there."""
    level, root = transformers_logging.get_verbosity(), logging.getLogger().level
    yield
    transformers_logging.set_verbosity(level)
    logging.getLogger().setLevel(root)
