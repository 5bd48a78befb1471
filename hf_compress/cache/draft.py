"""What a build that has begun is to become: `building.json`. A build that goes on must agree with it, or two halves would not fit."""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import xxhash

from hf_compress.cache.codec_name import CodecName
from hf_compress.cache.files import read_file, write_atomic
from hf_compress.cache.manifest import TeacherIdentity
from hf_compress.cache.plan import Plan
from hf_compress.cache.selection import Selection
from hf_compress.cache.strict_json import difference, parse
from hf_compress.errors import CacheError

FILE_NAME = "building.json"
_LARGEST = 1 << 24
# Seconds within which a file that one process wrote is seen by all: a network's file systems take some.
SEEN_WITHIN = 10.0


@dataclass(frozen=True)
class Begun:
    """What a build that has begun was to keep of hidden states, and its `distillation` as the manifest will have it."""

    selection: Selection
    codec: CodecName
    distillation: dict[str, Any]


def begun(folder: Path) -> Begun | None:
    """What a build that was stopped in this folder was to keep; None where none was begun, or nothing can be made of its plan."""
    try:
        content: Any = parse(read_file(folder / FILE_NAME, _LARGEST), str(folder / FILE_NAME))
        return Begun(Selection.from_json(content["selection"]), content["codec"], dict(content["distillation"]))
    except (CacheError, KeyError, OSError, TypeError, ValueError):
        return None


@dataclass(frozen=True)
class Draft:
    """The settings of a build, as JSON."""

    content: dict[str, Any]

    @classmethod
    def of(
        cls,
        *,
        teacher: TeacherIdentity,
        tokenizer: str,
        selection: Selection,
        codec: str,
        signals: Mapping[str, Any],
        distillation: Mapping[str, Any],
        plan: Plan,
        batch_tokens: int,
    ) -> Draft:
        """Put together what has to stay as it is.

        Args:
            teacher, tokenizer, selection, codec, distillation: as the manifest will have them.
            signals: which signals are stored.
            plan: which examples, and in which batches.
            batch_tokens: the plan's; other batches round otherwise.
        """
        examples = {"count": plan.examples, "keys": xxhash.xxh3_128_hexdigest(plan.keys.tobytes()), "tokens_a_forward": batch_tokens}
        content = {
            # The same teacher may lie elsewhere by now, and be scored on other examples.
            "teacher": {name: value for name, value in asdict(teacher).items() if name not in ("name", "scores")},
            "tokenizer": tokenizer,
            "selection": selection.to_json(),
            "codec": codec,
            "signals": dict(signals),
            "distillation": dict(distillation),
            "examples": examples,
        }
        return cls(json.loads(json.dumps(content)))

    def agree_with(self, folder: Path) -> None:
        """Look at what stands in the folder.

        Raises:
            CacheError: if a build with other settings was begun there, or there are files of which nothing says whose they are.
        """
        path = folder / FILE_NAME
        if not path.exists():
            left = sorted(file.name for file in folder.glob("*.safetensors"))
            if left:
                raise CacheError(
                    f"{folder} holds {len(left)} files of a teacher on disk (the first is {left[0]}), but neither its manifest.json nor "
                    "its building.json, so of which teacher is not known. Delete the folder, or choose another."
                )
            return
        found = parse(read_file(path, _LARGEST), str(path))
        if differs := difference(found, self.content):
            raise CacheError(
                f"A teacher on disk was begun in {folder} with other settings, and is not finished: {differs}. Finish it with the settings "
                "it was begun with, choose another folder, or delete this one."
            )

    def agree_among(self, drafts: Sequence[Draft]) -> None:
        """Compare with those of the other processes, by rank.

        Raises:
            CacheError: on every process, if they would build different things: they read other data, or were given other flags.
        """
        for rank, other in enumerate(drafts):
            if differs := difference(other.content, drafts[0].content):
                raise CacheError(
                    f"The processes of this run would not build the same teacher on disk. Process {rank}, against process 0: {differs}. "
                    "Give all of them the same training data, the same teacher and the same flags."
                )

    def see_in(self, folder: Path) -> None:
        """See what the first process wrote, from another one.

        Raises:
            CacheError: it is not there, so the folder is on a disk that the processes do not share.
        """
        until = time.monotonic() + SEEN_WITHIN
        while True:
            with contextlib.suppress(CacheError):
                if difference(parse(read_file(folder / FILE_NAME, _LARGEST), FILE_NAME), self.content) is None:
                    return
            if time.monotonic() >= until:
                raise not_shared(folder, FILE_NAME)
            time.sleep(0.1)

    def save(self, folder: Path) -> None:
        """Write it before the first shard."""
        write_atomic(folder / FILE_NAME, json.dumps(self.content, indent=1).encode())

    @staticmethod
    def remove(folder: Path) -> None:
        """The build is done."""
        with contextlib.suppress(FileNotFoundError):
            (folder / FILE_NAME).unlink()


def not_shared(folder: Path, file: str) -> CacheError:
    """What to say where one process does not see what another wrote."""
    return CacheError(
        f"The processes of this run do not share the folder {folder}: {file}, which one of them wrote there, another does not see. Name a "
        "folder on a disk that all of them read and write (--teacher_cache_dir); or build the teacher on disk on one machine, and copy the "
        "finished folder to the others."
    )
