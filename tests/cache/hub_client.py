"""huggingface_hub's own client in this process, led to the stand-in server; and small caches to send there."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import huggingface_hub.file_download
import pytest
from huggingface_hub import constants

from hf_compress.cache import hub as hub_module
from hf_compress.cache.hub import local_folder
from hf_compress.cache.reader import TeacherCache
from hf_compress.cache.selection import Selection
from hf_compress.errors import CacheError
from hf_compress.signals import SignalSpec
from tests.cache.hub_server import TOKEN, HubServer, serving
from tests.cache.tiny_caches import builder, pairs, states
from tests.tiny_models import tiny_model

ROOT = Path(__file__).parents[2]
ADDRESS = "hf://datasets/me/cache"


def build(folder: Path, selection: Selection | None = None, seed: int = 1, spec: SignalSpec | None = None) -> Path:
    model = tiny_model("bert", num_layers=4, seed=seed)
    building = builder(folder, model, pairs(10), spec or SignalSpec(logits=True) | states(2, 4), selection)
    building.build()
    building.run.source.close()
    return folder


def connected(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[HubServer]:
    """The stand-in, for huggingface_hub in this process, which has an empty home and is logged in; for a fixture."""
    with serving() as server:
        monkeypatch.setattr(constants, "ENDPOINT", server.url)
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", f"{server.url}/{{repo_id}}/resolve/{{revision}}/{{filename}}")
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setattr(constants, "HF_HOME", str(tmp_path / "home"))
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "home" / "hub"))
        monkeypatch.setattr(huggingface_hub.file_download.time, "sleep", lambda seconds: None)
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        hub_module._copy_of.cache_clear()
        yield server
        hub_module._copy_of.cache_clear()


def again() -> None:
    """As in another process."""
    hub_module._copy_of.cache_clear()


def pushed(hub: HubServer, folder: Path, where: str = "me/cache", **more: Any) -> str:
    TeacherCache(folder).push_to_hub(where, **more)
    return hub.repos["me/cache"].branches[more.get("revision") or "main"]


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def error(name: str = ADDRESS) -> str:
    again()
    with pytest.raises(CacheError) as caught:
        local_folder(name)
    return str(caught.value)


def home_of(tmp_path: Path) -> Path:
    return tmp_path / "home" / "hf_compress" / "teachers" / "datasets--me--cache"


def environment(hub: HubServer, tmp_path: Path) -> dict[str, str]:
    """For a process of its own."""
    home = str(tmp_path / "home")
    own = {"HF_ENDPOINT": hub.url, "HF_HOME": home, "HF_HUB_DISABLE_XET": "1", "HF_HUB_OFFLINE": "0", "PYTHONPATH": str(ROOT)}
    return {**os.environ, **own}
