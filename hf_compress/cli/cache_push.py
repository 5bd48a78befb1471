"""`hf-compress cache push`: a teacher on disk, to the Hugging Face hub."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from hf_compress.cache.hub_address import HubAddress, is_hub_address
from hf_compress.cli.flags import FlagParser
from hf_compress.errors import ArgumentError, CacheError

PURPOSE = "put a cache on the Hugging Face hub, for others to train from"


def main(argv: Sequence[str]) -> int:
    """Upload a cache; returns the exit code."""
    parser = FlagParser("cache push", PURPOSE[0].upper() + PURPOSE[1:] + ".")
    parser.add_argument("folder", metavar="FOLDER", help="The cache; it is checked to the last byte before anything is uploaded.")
    parser.add_argument("repo_id", metavar="USER/NAME", help="The data set repository, made if need be; USER/NAME/FOLDER: a folder in it.")
    parser.flag("private", action="store_true", help="Make the repository a private one.")
    parser.flag("revision", metavar="BRANCH", help="The branch, made if need be; by default main.")
    parser.flag("commit_message", metavar="WORDS", help="What the commit is called.")
    flags = parser.parse(argv)
    folder, other = Path(flags.folder), Path(flags.repo_id)
    if is_hub_address(flags.folder) or (not folder.is_dir() and (other / "manifest.json").exists()):
        raise ArgumentError(f"First the folder, then where it goes: `hf-compress cache push {flags.repo_id} {flags.folder}`.")
    address = HubAddress.for_push(flags.repo_id, flags.revision)
    if not folder.is_dir():
        raise CacheError(f"There is no folder {folder}. Name the folder of a teacher on disk, one with a manifest.json.")

    # From here on with torch, which the help need not wait for.
    from hf_compress.cache.hub_push import push

    commit = push(folder, address, private=flags.private or None, commit_message=flags.commit_message)
    print(f"{commit.commit_url}\ntrain from it, on any machine: --teacher_cache_dir {address}")
    return 0
