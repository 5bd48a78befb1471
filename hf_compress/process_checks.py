"""What the processes of a run must have in common: looked at once, before the first step, and refused on all of them in the same words."""

from __future__ import annotations

import random
import socket
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
import xxhash
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from hf_compress.agreement import from_all, several
from hf_compress.cache.hub_address import is_hub_address
from hf_compress.cache.manifest import Manifest
from hf_compress.errors import ArgumentError, CacheError, CompressionError, DataError, TeacherError
from hf_compress.losses.loss import Loss
from hf_compress.teacher_identity import has_cache
from hf_compress.teacher_places import count_of_teachers, places

# How many examples of the data, and how many values of each of the teacher's parameters, are compared.
ROWS, VALUES = 16, 16
Seen = tuple[str, str]  # which machine, and what is seen there


def refuse_other_caches(folder: str | None) -> None:
    """See that all processes find the same teacher on disk, or all find none.

    Args:
        folder: this process's `--teacher_cache_dir`; of several teachers, with commas between.

    Raises:
        CacheError: on every process.
    """
    if not several():
        return
    try:
        count = count_of_teachers(None, folder, None)
        seen = " and ".join(_cache_seen(each) for each in places(folder, count, flag="teacher_cache_dir"))
    except CompressionError as error:
        seen = f"what cannot be read: {error}"
    _refuse_differences(
        CacheError,
        seen,
        "The processes of this run see different teachers on disk",
        "Name a folder on a disk that all of them share (--teacher_cache_dir), or copy one finished folder to each machine.",
    )


def _cache_seen(folder: str | None) -> str:
    if folder is None:
        return "none, for it has no --teacher_cache_dir"
    if is_hub_address(folder):
        return f"{folder} on the hub"
    if not has_cache(folder):
        return "none that is finished"
    manifest = Manifest.load(Path(folder))
    content = xxhash.xxh3_64_hexdigest(repr((manifest.teacher.weights, manifest.index, manifest.shared, manifest.shards)).encode())
    return f"one of {manifest.teacher.name} with {manifest.examples:,} examples (content {content})"


def refuse_other_runs(dataset: Any, losses: Sequence[Loss], teachers: Iterable[object]) -> None:
    """See that all processes have the same training data, losses and live teachers.

    Args:
        dataset: the training data.
        losses: in force.
        teachers: each a `LiveTeacher`, or anything else that answers.

    Raises:
        DataError, ArgumentError, TeacherError: on every process.
    """
    if not several():
        return
    models = [model for teacher in teachers if isinstance(model := getattr(teacher, "model", None), nn.Module)]
    _refuse_differences(
        DataError,
        _data_seen(dataset),
        "The processes of this run have different training data",
        "Give all of them the same file, in the same order, with the same --max_train_samples and --seed: each takes its own part of it.",
    )
    _refuse_differences(
        ArgumentError,
        "; ".join(map(str, losses)),
        "The processes of this run learn by different losses",
        "Start all of them with the same flags.",
    )
    _refuse_differences(
        TeacherError,
        f"weights {', '.join(map(_weights_seen, models))}" if models else "no live one",
        "The processes of this run have different teachers",
        "Load the same model on all of them.",
    )


def _refuse_differences(kind: type[CompressionError], seen: str, what: str, way_out: str) -> None:
    everyone: list[Seen] = from_all((socket.gethostname(), seen))
    other = next((rank for rank, each in enumerate(everyone) if each[1] != everyone[0][1]), None)
    if other is None:
        return
    hosts = {host for host, _ in everyone}
    verb = "sees" if kind is CacheError else "has"
    told = [
        f"process {rank}{f' ({host})' if len(hosts) > 1 else ''} {verb} {found}"
        for rank, (host, found) in enumerate(everyone)
        if rank in (0, other)
    ]
    raise kind(f"{what}: {'; '.join(told)}. {way_out}")


def _data_seen(dataset: Any) -> str:
    if not hasattr(dataset, "__len__") or not hasattr(dataset, "__getitem__"):
        return "data without a length"
    count = len(dataset)
    places = sorted({int(place) for place in np.linspace(0, count - 1, ROWS)}) if count else []
    with _random_numbers_kept():
        first, again = (xxhash.xxh3_64_hexdigest(repr([_plain(dataset[place]) for place in places]).encode()) for _ in range(2))
    # Data that is drawn at random tells nothing.
    return f"{count:,} examples" + (f" (content {first})" if first == again else "")


def _plain(value: Any) -> Any:
    """Numbers and text, in whatever they come; an image, say, is left out."""
    if isinstance(value, Tensor | np.ndarray):
        return value.tolist()
    if isinstance(value, Mapping):
        return {str(name): _plain(each) for name, each in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(each) for each in value]
    return value if isinstance(value, str | int | float | bool) else None


def _weights_seen(model: nn.Module) -> str:
    """Of what lies whole in this process; parts of split parameters differ from process to process."""
    digest = xxhash.xxh3_64()
    for name, parameter in model.named_parameters():
        if not isinstance(parameter, DTensor) and not hasattr(parameter, "ds_id") and parameter.device.type != "meta":
            digest.update(name.encode())
            digest.update(parameter.detach().reshape(-1)[:VALUES].cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


@contextmanager
def _random_numbers_kept() -> Iterator[None]:
    """Data may draw; the run's own random numbers stay where they are."""
    python, arrays = random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng(devices=[]):
            yield
    finally:
        random.setstate(python)
        np.random.set_state(arrays)
