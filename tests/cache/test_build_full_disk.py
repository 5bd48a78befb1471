"""A disk that fills up in the middle of a build: a small one of its own, where mounting is allowed, and a limit on the size of files."""

from __future__ import annotations

import errno
import logging
import re
import resource
import shutil
import subprocess
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from torch import Tensor, nn

from hf_compress.cache import plan as plans
from hf_compress.cache.verify import verify
from hf_compress.errors import CacheError
from hf_compress.signals import Signals, SignalSpec
from tests.cache.test_build import DATA, EVERYTHING, files, teacher
from tests.cache.tiny_caches import Counting, builder


@dataclass
class Disk:
    """A place for a cache, which can be filled up and freed again.

    Attributes:
        folder: where it is.
        mounted: it is a disk of its own; else a full one is a limit on the size of files.
    """

    folder: Path
    mounted: bool
    _limits: tuple[int, int] = field(default_factory=lambda: resource.getrlimit(resource.RLIMIT_FSIZE))

    @property
    def reason(self) -> str:
        return "the disk is full" if self.mounted else "the file would be larger than the limit for one file"

    def fill(self) -> None:
        """Somebody else writes until there is no room."""
        if not self.mounted:
            resource.setrlimit(resource.RLIMIT_FSIZE, (600, self._limits[1]))
            return
        with (self.folder / "filler").open("wb", buffering=0) as filler:
            for size in (1 << 16, 1 << 12, 1):
                try:
                    while True:
                        filler.write(bytes(size))
                except OSError as error:
                    assert error.errno == errno.ENOSPC

    def free(self) -> None:
        if self.mounted:
            (self.folder / "filler").unlink()
        else:
            resource.setrlimit(resource.RLIMIT_FSIZE, self._limits)


@pytest.fixture(params=["a small disk", "a limit"])
def disk(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[Disk]:
    folder = tmp_path / "disk"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", str(folder)]
    mounted = request.param == "a small disk" and shutil.which("mount") is not None
    mounted = mounted and subprocess.run(command, capture_output=True, check=False).returncode == 0  # without root there is the limit alone
    found = Disk(folder, mounted)
    try:
        yield found
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, found._limits)
        if mounted:
            subprocess.run(["umount", "--lazy", str(folder)], check=True)


class Filling(Counting):
    """A teacher beside which the disk fills up, after so many shards."""

    def __init__(self, model: nn.Module, disk: Disk, shards: int) -> None:
        super().__init__(model)
        self.disk, self.shards, self.filled = disk, shards, False

    def signals(self, inputs: Mapping[str, Tensor], spec: SignalSpec) -> Signals:
        if not self.filled and len(list((self.disk.folder / "cache").glob("shard-*.safetensors"))) == self.shards:
            self.filled = True
            self.disk.fill()
        return super().signals(inputs, spec)


@pytest.mark.parametrize("shards", [0, 3])
def test_a_build_goes_on_when_there_is_room_again(
    tmp_path: Path, disk: Disk, shards: int, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(plans, "SHARD_EXAMPLES", 6)
    caplog.set_level(logging.WARNING, "hf_compress")  # the pace is found out by asking the teacher, too
    whole = builder(tmp_path / "whole", teacher(), DATA, EVERYTHING).build()
    folder, model = disk.folder / "cache", teacher()
    source = Filling(model, disk, shards)
    with pytest.raises(CacheError, match=f"shard-0000{shards}.safetensors cannot be written: {re.escape(disk.reason)}") as caught:
        builder(folder, model, DATA, EVERYTHING, source=source).build()
    assert source.filled  # the price was looked at while there was room
    said = str(caught.value)
    assert f"It needs {whole.shards[shards].bytes:,} bytes" in said
    assert "What was finished before is kept: make room, or choose less to store, and start the same command again" in said
    assert ", 0 are free on that disk" in said or not disk.mounted
    assert len(list(folder.glob("shard-*"))) == shards and not list(folder.glob("*.tmp"))
    disk.free()
    again = Counting(model)
    builder(folder, model, DATA, EVERYTHING, source=again).build()
    assert again.asked == sum(shard.examples for shard in whole.shards[shards:])
    assert files(folder) == files(tmp_path / "whole")
    assert verify(folder).problems == ()
