"""What tests of caches on the hub share."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from hf_compress.cache.selection import Selection
from tests.cache.hub_client import build, connected
from tests.cache.hub_server import HubServer


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished cache with part of the hidden states."""
    return build(tmp_path_factory.mktemp("built") / "cache", Selection.parse("2l_3t_0.5h"))


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[HubServer]:
    """A stand-in for the hub, to which huggingface_hub's own client talks."""
    yield from connected(tmp_path, monkeypatch)
