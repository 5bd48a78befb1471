"""Where a cache lies on the Hugging Face hub, in one word: `hf://datasets/USER/NAME@REVISION/folder/in/it`. Text only: no request."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from pathlib import Path
from urllib.parse import quote, unquote

from hf_compress.errors import ArgumentError

_PART = r"[A-Za-z0-9][A-Za-z0-9._-]*"
_ADDRESS = re.compile(rf"(?:hf://)?(?:datasets/)?(?P<repo>{_PART}/{_PART})(?:@(?P<revision>[^/@]+))?(?:/(?P<folder>.*))?")
_PAGE = re.compile(
    rf"https://(?:huggingface\.co|hf\.co)/datasets/(?P<repo>{_PART}/{_PART})(?:/tree/(?P<revision>[^/]+)(?:/(?P<folder>.+))?)?/?"
)
_COMMIT = re.compile(r"[0-9a-f]{40}")
_OTHER_KINDS = ("models", "spaces", "buckets", "kernels")


@dataclass(frozen=True)
class HubAddress:
    """A cache in a data set repository of the hub.

    Attributes:
        repo: USER/NAME.
        revision: a branch, a tag, or a commit.
        folder: in the repository, "" for its top.
    """

    repo: str
    revision: str = "main"
    folder: str = ""

    def __str__(self) -> str:
        revision = "" if self.revision == "main" else f"@{quote(self.revision, safe='')}"
        return f"hf://datasets/{self.repo}{revision}" + (f"/{self.folder}" if self.folder else "")

    def path(self, name: str) -> str:
        """A file of the cache, as the repository names it."""
        return f"{self.folder}/{name}" if self.folder else name

    @classmethod
    def parse(cls, text: str) -> HubAddress:
        """Read `hf://datasets/USER/NAME`, with `@REVISION` and `/FOLDER` where they are given; `hf://` and `datasets/` may be left out.

        A slash in a revision is written %2F, as in `@refs%2Fpr%2F1`.

        Raises:
            ArgumentError: if it is none.
        """
        scheme = "hf://datasets/" if is_hub_address(text) else ""
        expected = f"Expected {scheme}USER/NAME, with @REVISION and /FOLDER/IN/IT after it where they are needed."
        if page := _PAGE.fullmatch(text):
            meant = page["repo"] + (f"@{page['revision']}" if page["revision"] else "") + (f"/{page['folder']}" if page["folder"] else "")
            raise ArgumentError(f"'{text}' is a page of the Hugging Face hub. Write hf://datasets/{meant}")
        found = _ADDRESS.fullmatch(text)
        if found is None:
            raise ArgumentError(f"'{text}' names no data set repository on the Hugging Face hub. {expected}")
        owner, _, _ = found["repo"].partition("/")
        if owner == "datasets":
            raise ArgumentError(f"'{text}' lacks the USER or the NAME of a repository on the Hugging Face hub. {expected}")
        if owner in _OTHER_KINDS:
            raise ArgumentError(f"'{text}': a teacher on disk lies in a data set repository, not among the {owner} of the hub. {expected}")
        folder = (found["folder"] or "").strip("/")
        if folder and not all(part.strip(".") for part in folder.split("/")):
            raise ArgumentError(f"'{text}': {folder} is no folder in a repository. {expected}")
        return cls(found["repo"], unquote(found["revision"] or "main"), folder)

    @classmethod
    def for_push(cls, text: str, revision: str | None) -> HubAddress:
        """Where something is to go, its branch perhaps named beside it.

        Raises:
            ArgumentError: it is no address, two branches are named, or a commit, to which nothing can be added.
        """
        address = cls.parse(text)
        if revision is not None and address.revision not in ("main", revision):
            raise ArgumentError(f"'{text}' names the branch {address.revision}, and --revision the branch {revision}. Name one.")
        chosen = revision or address.revision
        if _COMMIT.fullmatch(chosen):
            raise ArgumentError(f"{chosen} is a commit, and nothing can be added to it: name a branch with --revision.")
        return replace(address, revision=chosen)


def is_hub_address(name: str | Path) -> bool:
    """Whether a name is meant for the hub, and not for a folder; it may still be malformed."""
    return str(name).startswith(("hf:", "https://huggingface.co/", "https://hf.co/"))
