"""A cache in a folder, to a data set repository on the Hugging Face hub: in one commit, so that it never lies there in part."""

from __future__ import annotations

import logging
import re
from pathlib import Path

from huggingface_hub import CommitInfo, CommitOperationAdd, CommitOperationDelete, HfApi
from huggingface_hub.hf_api import RepoFile
from huggingface_hub.utils.tqdm import are_progress_bars_disabled
from tqdm.auto import tqdm

from hf_compress.cache.hub import files_of, hub_api
from hf_compress.cache.hub_address import HubAddress
from hf_compress.cache.hub_card import OURS, card, public_name
from hf_compress.cache.hub_errors import hub_errors
from hf_compress.cache.manifest import Manifest
from hf_compress.cache.shard import is_shard_name
from hf_compress.cache.verify import verify
from hf_compress.errors import CacheError

logger = logging.getLogger(__name__)

README = "README.md"
_OTHER_FILES = re.compile(r"(shared|index(-\d{5})?)\.safetensors")
_AGAIN = "start the same command again: what was uploaded is not uploaded twice"


def push(
    folder: Path, address: HubAddress, *, private: bool | None = None, commit_message: str | None = None, token: str | None = None
) -> CommitInfo:
    """Check a cache, and upload it; what another cache left at that place is replaced, and kept in the history of the repository.

    Args:
        folder: a finished cache. A README.md in it becomes the data set card; else one is written.
        address: where it goes, see `HubAddress.for_push`.
        private: whether a repository that is made is private; None for what is usual where it is made.
        commit_message: by default, what is uploaded.
        token: of the hub; None for the one that is logged in.

    Returns:
        The commit, as huggingface_hub tells of it.

    Raises:
        CacheError: the cache is unfinished or damaged, the repository is public where a private one was asked for, or the hub does not let
            you in or is not reached.
    """
    manifest = _checked(folder)
    api = hub_api(token)
    if public_name(manifest.teacher.name) != manifest.teacher.name:
        logger.warning("the manifest names the teacher by where it lay, and that will be read on the hub: %s", manifest.teacher.name)
    with hub_errors(address, "the repository was made", _AGAIN):
        api.create_repo(address.repo, repo_type="dataset", private=private, exist_ok=True)
        if address.revision != "main":
            api.create_branch(address.repo, repo_type="dataset", branch=address.revision, exist_ok=True)
        info = api.dataset_info(address.repo, revision=address.revision)
    if private and not info.private:
        raise CacheError(
            f"{address.repo} is there already, and everybody can read it: nothing was uploaded. Make it private in its settings "
            f"({api.endpoint}/datasets/{address.repo}/settings), or name another repository."
        )
    with hub_errors(address, "its files were listed", _AGAIN):
        found = api.list_repo_tree(address.repo, recursive=True, revision=address.revision, repo_type="dataset")
        there = {file.path for file in found if isinstance(file, RepoFile)}
    names = files_of(manifest)
    operations: list[CommitOperationAdd | CommitOperationDelete] = [
        CommitOperationAdd(address.path(name), folder / name) for name in (*names[1:], names[0])
    ]
    operations += _cards(api, folder, address, manifest, there)
    operations += [CommitOperationDelete(path) for path in sorted(there) if _is_left_over(path, address, names)]
    message = commit_message or f"Teacher on disk of {public_name(manifest.teacher.name)}: {manifest.examples:,} examples"
    with hub_errors(address, "it was uploaded", _AGAIN):
        return api.create_commit(address.repo, operations, commit_message=message, repo_type="dataset", revision=address.revision)


def _checked(folder: Path) -> Manifest:
    manifest = Manifest.load(folder)
    silent = are_progress_bars_disabled() or None
    with tqdm(total=manifest.bytes, desc="checking", unit="B", unit_scale=True, disable=silent) as bar:
        problems = verify(folder, bar.update).problems
    if problems:
        more = f" And {len(problems) - 3} more: `hf-compress cache verify {folder}`." if len(problems) > 3 else ""
        raise CacheError(f"{folder} is damaged, so nothing was uploaded: {' '.join(problems[:3])}{more}")
    return manifest


def _cards(api: HfApi, folder: Path, address: HubAddress, manifest: Manifest, there: set[str]) -> list[CommitOperationAdd]:
    """The data set card, unless somebody else wrote one. A cache in a folder has its own there, and at the top if none is there."""
    own = folder / README
    text = own.read_bytes() if own.is_file() else card(manifest, address).encode()
    paths = [address.path(README)] + ([README] if address.folder and README not in there else [])
    return [CommitOperationAdd(path, text) for path in paths if own.is_file() or path not in there or _is_ours(api, address, path)]


def _is_ours(api: HfApi, address: HubAddress, path: str) -> bool:
    with hub_errors(address, "its data set card was read", _AGAIN):
        found = api.hf_hub_download(address.repo, path, repo_type="dataset", revision=address.revision)
    return OURS in Path(found).read_text(encoding="utf-8", errors="replace")


def _is_left_over(path: str, address: HubAddress, names: list[str]) -> bool:
    """Whether it is a file of a cache that lay there before."""
    parent, _, name = path.rpartition("/")
    return parent == address.folder and name not in names and (is_shard_name(name) or _OTHER_FILES.fullmatch(name) is not None)
