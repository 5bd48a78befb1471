"""A cache on the Hugging Face hub, as a folder here.

    hf://datasets/USER/NAME@REVISION --what commit is that?--> $HF_HOME/hf_compress/teachers/datasets--USER--NAME/COMMIT
                                                               is it there? then no more is asked
    COMMIT.partial <--the manifest, aside; then the files that it names-- the hub
    COMMIT.partial --with the manifest, every byte is checked--> renamed to COMMIT

A commit never changes, and a folder of that name is whole: it was renamed when it was. What a killed download left is in `.partial`, and
the next one goes on from there. The files are real ones, since a cache's reader refuses links.
"""

from __future__ import annotations

import contextlib
import functools
import glob
import logging
import os
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from urllib.parse import quote

from huggingface_hub import HfApi, constants
from huggingface_hub.file_download import REGEX_COMMIT_HASH
from huggingface_hub.hf_api import RepoFile
from huggingface_hub.utils.tqdm import are_progress_bars_disabled
from tqdm.auto import tqdm

from hf_compress import __version__
from hf_compress.cache.files import write_atomic
from hf_compress.cache.hub_address import HubAddress, is_hub_address
from hf_compress.cache.hub_errors import HubUnreachableError, hub_errors
from hf_compress.cache.lock import waiting_lock
from hf_compress.cache.manifest import MANIFEST_FILE, SHARED_FILE, Manifest
from hf_compress.cache.price import free_bytes, readable
from hf_compress.cache.verify import verify
from hf_compress.errors import CacheError

logger = logging.getLogger(__name__)

# How long the hub may take to say what a branch is now, in seconds: without a network the copy that is here is read soon.
_PATIENCE = 10.0
_AGAIN = "start the same command again: what has arrived whole is kept"


def local_folder(name: str | Path) -> Path:
    """Where a cache lies: the folder itself, or a whole copy of one on the hub, downloaded and checked if it is not here yet.

    Args:
        name: a folder, or an address such as "hf://datasets/USER/NAME", see `HubAddress.parse`.

    Raises:
        ArgumentError: the address is malformed.
        CacheError: there is no such repository or no cache in it, it may not be seen, the hub cannot be reached, what came is damaged, or
            there is too little room.
    """
    return _copy_of(HubAddress.parse(str(name))) if is_hub_address(name) else Path(name)


def read_manifest(name: str | Path) -> Manifest:
    """The manifest of a cache, and no more of it if it is on the hub and not here.

    Raises:
        ArgumentError, CacheError: see `local_folder`.
    """
    if not is_hub_address(name):
        return Manifest.load(Path(name))
    address = HubAddress.parse(str(name))
    here = _home(address)
    commit = _commit_of(address, here)
    if _is_whole(target := _target(address, here, commit)):
        return Manifest.load(target)
    listed = _listed(address, commit)
    with tempfile.TemporaryDirectory() as folder:
        return _fetch_manifest(address, commit, Path(folder), listed)


def hub_api(token: str | None = None) -> HfApi:
    """The client, which tells the hub who asks."""
    return HfApi(library_name="hf_compress", library_version=__version__, token=token)


@functools.cache  # a process reads one commit, whatever is pushed meanwhile
def _copy_of(address: HubAddress) -> Path:
    here = _home(address)
    commit = _commit_of(address, here)
    target = _target(address, here, commit)
    if not _is_whole(target):
        try:
            _fetch(address, commit, target)
        except OSError as error:
            where = error.filename or here
            raise CacheError(
                f"{where}: {error.strerror or error}, and a copy of {address} is to be kept there. Set HF_HOME to another folder."
            ) from error
    _remember(address, here, commit)
    return target


def _home(address: HubAddress) -> Path:
    """Of one repository."""
    return Path(constants.HF_HOME) / "hf_compress" / "teachers" / f"datasets--{address.repo.replace('/', '--')}"


def _target(address: HubAddress, here: Path, commit: str) -> Path:
    return here / (f"{commit}-{quote(address.folder, safe='')}" if address.folder else commit)


def _is_whole(folder: Path) -> bool:
    return (folder / MANIFEST_FILE).exists()


# --- which commit ---


def _commit_of(address: HubAddress, here: Path) -> str:
    """The commit that a revision is now; the one that it was when it was last read, if the hub cannot be reached."""
    if REGEX_COMMIT_HASH.fullmatch(address.revision):
        return address.revision
    try:
        with hub_errors(address, "it was looked up", "start the same command again"):
            info = hub_api().dataset_info(address.repo, revision=address.revision, timeout=_PATIENCE)
            return str(info.sha)
    except HubUnreachableError as error:
        ref = _ref(address, here)
        commit = ref.read_text().strip() if ref.exists() else ""
        if not commit or not _is_whole(_target(address, here, commit)):
            raise HubUnreachableError(f"{error} It was not downloaded before, so there is no copy to read.") from error
        logger.warning("%s is read as it was when the hub was last asked: commit %s. %s", address, commit[:12], error)
        return commit


def _ref(address: HubAddress, here: Path) -> Path:
    return here / "refs" / quote(address.revision, safe="")


def _remember(address: HubAddress, here: Path, commit: str) -> None:
    ref = _ref(address, here)
    if address.revision != commit and not (ref.exists() and ref.read_text() == commit):
        with contextlib.suppress(OSError, CacheError):  # what is in a folder that cannot be written is read all the same
            ref.parent.mkdir(exist_ok=True)
            write_atomic(ref, commit.encode())


# --- the download ---


def _fetch(address: HubAddress, commit: str, target: Path) -> None:
    """Download it while nobody else does; whoever waited finds it there."""

    def say() -> None:
        logger.info("%s is being downloaded by another process; waiting for it", address)

    target.parent.mkdir(parents=True, exist_ok=True)
    with waiting_lock(target.with_name(f"{target.name}.lock"), say):
        if not _is_whole(target):
            _download(address, commit, target)


def _download(address: HubAddress, commit: str, target: Path) -> None:
    partial = target.with_name(f"{target.name}.partial")
    for left in partial.glob(".cache/huggingface/download/**/*.incomplete"):
        left.unlink()  # of a download that was killed
    content = partial / address.folder
    listed = _listed(address, commit)
    aside = partial / ".manifest"  # so that what is here in part does not look like a cache
    manifest = _fetch_manifest(address, commit, aside, listed)
    names = files_of(manifest)
    sizes = {name: listed.get(address.path(name), -1) for name in names}
    _refuse_other_files(address, manifest, sizes)
    present = sum(size for name, size in sizes.items() if _size(content / name) == size)
    _refuse_too_little_disk(address, sum(sizes.values()), present, target)
    logger.info("downloading %s: %s to %s", address, readable(sum(sizes.values()) - present), target)
    with hub_errors(address, "it was downloaded", _AGAIN):
        hub_api().snapshot_download(
            address.repo,
            repo_type="dataset",
            revision=commit,
            local_dir=partial,
            allow_patterns=[glob.escape(address.path(name)) for name in names if name != MANIFEST_FILE],
        )
    shutil.copyfile(aside / address.path(MANIFEST_FILE), content / MANIFEST_FILE)
    _refuse_damage(address, content, names, manifest)
    for own in (partial / ".cache", aside):
        shutil.rmtree(own, ignore_errors=True)
    try:
        os.rename(content, target)
    except OSError:
        if not _is_whole(target):  # else another machine was faster, on a disk whose locks do not hold
            raise
    shutil.rmtree(partial, ignore_errors=True)


def _listed(address: HubAddress, commit: str) -> dict[str, int]:
    """The size of each file of the repository, by path.

    Raises:
        CacheError: if there is no manifest where it should be; the message says where one is.
    """
    with hub_errors(address, "its files were listed", "start the same command again"):
        found = hub_api().list_repo_tree(address.repo, recursive=True, revision=commit, repo_type="dataset")
        listed = {file.path: file.size for file in found if isinstance(file, RepoFile)}
    if address.path(MANIFEST_FILE) in listed:
        return listed
    elsewhere = sorted(path.removesuffix(MANIFEST_FILE).rstrip("/") for path in listed if f"/{path}".endswith(f"/{MANIFEST_FILE}"))
    where = f"the folder {address.folder} of {address.repo}" if address.folder else address.repo
    if elsewhere:
        ask = " or ".join(str(HubAddress(address.repo, address.revision, folder)) for folder in elsewhere[:5])
        raise CacheError(f"{address}: there is no {MANIFEST_FILE} in {where}. Did you mean {ask}?")
    raise CacheError(
        f"{address}: there is no {MANIFEST_FILE} in {where}, so it is no teacher on disk. `hf-compress cache push FOLDER {address.repo}` "
        "puts one there, whole."
    )


def _fetch_manifest(address: HubAddress, commit: str, folder: Path, listed: Mapping[str, int]) -> Manifest:
    path = address.path(MANIFEST_FILE)
    with hub_errors(address, "its manifest was downloaded", _AGAIN):
        hub_api().hf_hub_download(address.repo, path, repo_type="dataset", revision=commit, local_dir=folder)
    try:
        return Manifest.load((folder / path).parent)
    except CacheError as error:
        (folder / path).unlink()  # to be fetched again, not kept
        raise CacheError(f"{address}: the manifest that came ({listed[path]} bytes on the hub) cannot be read. {error}") from error


def files_of(manifest: Manifest) -> list[str]:
    """All files of a cache, the manifest first."""
    shared = [SHARED_FILE] if manifest.shared is not None else []
    return [MANIFEST_FILE, *shared, manifest.index_file, *(shard.name for shard in manifest.shards)]


def _refuse_other_files(address: HubAddress, manifest: Manifest, sizes: Mapping[str, int]) -> None:
    """Before much is downloaded."""
    problems = [f"{name} is missing" for name, size in sizes.items() if size < 0]
    for shard in manifest.shards:
        if sizes[shard.name] not in (-1, shard.bytes):
            problems.append(f"{shard.name} has {sizes[shard.name]:,} bytes, expected {shard.bytes:,}")
    if problems:
        raise CacheError(
            f"{address} is not whole on the hub: {_some(problems)}, as its manifest says. Whoever has the folder that it was made of can "
            f"put it there again: `hf-compress cache push FOLDER {address.repo}`."
        )


def _refuse_too_little_disk(address: HubAddress, total: int, present: int, target: Path) -> None:
    free = free_bytes(target)
    if total - present > free:
        raise CacheError(
            f"{address} has {readable(total)}, of which {readable(total - present)} are not here yet, but only {readable(free)} are free "
            f"in {constants.HF_HOME}. Make room, or set HF_HOME to a folder on a larger disk."
        )


def _refuse_damage(address: HubAddress, content: Path, names: list[str], manifest: Manifest) -> None:
    with tqdm(
        total=manifest.bytes, desc="checking what came", unit="B", unit_scale=True, disable=are_progress_bars_disabled() or None
    ) as bar:
        problems = verify(content, bar.update).problems
    if not problems:
        return
    damaged = [name for name in names if any(f"{content / name}" in problem for problem in problems)]
    for name in {MANIFEST_FILE, *(damaged or names)}:  # those that are whole need not come again
        (content / name).unlink(missing_ok=True)
    raise CacheError(
        f"{address} is damaged: {_some(list(problems))} Start the same command again: {', '.join(damaged[:5]) or 'it'} will be downloaded "
        f"anew. If that comes out the same, it is damaged on the hub: whoever has the folder that it was made of can push it again "
        f"(`hf-compress cache push FOLDER {address.repo}`)."
    )


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else -1


def _some(words: list[str]) -> str:
    return "; ".join(words[:3]) + (f"; and {len(words) - 3} more" if len(words) > 3 else "")
