"""The part of a model card that is about compression, put into the card that transformers writes.

README.md   ---
            license, base_model, tags, ...        completed
            ---
            # name
            This model is ...                     says what it was made of
            <!-- hf_compress: begin -->
            ## Compression                        a table; the papers
            <!-- hf_compress: end -->
            ## Model description ...
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub.errors import HFValidationError
from huggingface_hub.repocard import metadata_load, metadata_save
from huggingface_hub.utils._validators import validate_repo_id

from hf_compress.card.papers import Paper

BEGIN, END = "<!-- hf_compress: begin -->", "<!-- hf_compress: end -->"
CARD_FILE = "README.md"
TAG = "hf_compress"

# What transformers' own card begins with.
_OPENING = re.compile(r"^This model (?:was trained from scratch|is a fine-tuned version of \[[^\]]*\]\([^)]*\)) on ", re.MULTILINE)
_OURS = re.compile(rf"\n*{re.escape(BEGIN)}.*?{re.escape(END)}\n*", re.DOTALL)


@dataclass(frozen=True)
class CardSection:
    """What a card says of a compressed model.

    Attributes:
        made: what it is, as the beginning of "... on the glue dataset".
        rows: of the table, words by heading; empty words are left out.
        tags: for the hub, beside `hf_compress`.
        papers: that it follows.
        base_model: models on the hub that it descends from.
    """

    made: str
    rows: dict[str, str]
    tags: tuple[str, ...]
    papers: tuple[Paper, ...] = ()
    base_model: tuple[str, ...] = ()

    def text(self) -> str:
        """In Markdown, between two marks by which it is found again."""
        lines = [BEGIN, "## Compression", "", "| | |", "|---|---|"]
        lines += [f"| {name} | {_cell(words)} |" for name, words in self.rows.items() if words]
        if self.papers:
            lines += ["", f"It follows {'; '.join(paper.link for paper in self.papers)}.", "", "```bibtex"]
            lines += ["\n\n".join(paper.bibtex for paper in self.papers), "```"]
        return "\n".join([*lines, END])


def complete_card(folder: str | Path, section: CardSection) -> None:
    """Put the section into the folder's README.md, in the place of one that is there, and complete its header; made if it is not there.

    Args:
        folder: of the model.
        section: what to say.
    """
    path = Path(folder) / CARD_FILE
    if not path.exists():
        path.write_text(f"---\nlibrary_name: transformers\n---\n\n# {Path(folder).resolve().name}\n\n{section.made}.\n", encoding="utf-8")
    text = _OURS.sub("\n\n", path.read_text(encoding="utf-8"))
    text = _OPENING.sub(lambda _: f"{section.made}, trained on ", text, count=1)
    at = text.find("\n## ")
    before, after = (text, "") if at < 0 else (text[:at], text[at:])
    path.write_text(f"{before.rstrip()}\n\n{section.text()}\n{after}", encoding="utf-8")
    metadata_save(path, _completed(metadata_load(path) or {}, section))


def _completed(metadata: dict[str, Any], section: CardSection) -> dict[str, Any]:
    """The header with our tags, and base models that the hub can find."""
    tags = metadata.get("tags") or []
    tags = [tag for tag in ([tags] if isinstance(tags, str) else tags) if _is_fit(tag)]
    tags += [tag for tag in (TAG, *section.tags) if tag not in tags]
    given = metadata.get("base_model") or []
    bases = [name for name in ([given] if isinstance(given, str) else given) if is_on_hub(name)]
    bases = bases or list(section.base_model)
    changed = {**metadata, "tags": tags}
    changed.pop("base_model", None)
    if bases:
        changed["base_model"] = bases[0] if len(bases) == 1 else bases
    return changed


def _is_fit(tag: str) -> bool:
    """Whether a tag is fit for the hub: PEFT's `base_model:adapter:NAME` is not, where the name is a folder."""
    return not tag.startswith("base_model:") or is_on_hub(tag.rsplit(":", 1)[-1])


def is_on_hub(name: str) -> bool:
    """Whether a model's name can be one on the hub: no folder of this machine."""
    if not name or os.path.exists(name) or os.path.isabs(name) or name.startswith((".", "~")):
        return False
    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return True


def named(name: str) -> str:
    """A model's name in Markdown: linked where the hub may have it, else the last part of its path."""
    if is_on_hub(name):
        return f"[{name}](https://huggingface.co/{name})"
    return f"`{os.path.basename(os.path.normpath(name))}`"


def _cell(words: str) -> str:
    return words.replace("|", "\\|").replace("\n", "<br>")
