"""The stand-in for the hub, as transformers' own client sees it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import transformers.utils.hub

from tests.cache.hub_client import connected
from tests.cache.hub_server import HubServer


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[HubServer]:
    """A stand-in for the hub, to which transformers' Trainer pushes."""
    monkeypatch.setattr(transformers.utils.hub, "_hf_api", None)  # it keeps the address that it first had
    yield from connected(tmp_path, monkeypatch)
