"""The kinds of files that hold examples, by their names' ends."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from hf_compress.errors import ArgumentError

Suffix = Literal["csv", "tsv", "json", "parquet"]
_SUFFIXES: dict[str, Suffix] = {".csv": "csv", ".tsv": "tsv", ".json": "json", ".jsonl": "json", ".parquet": "parquet"}


def suffix_of(path: str | Path) -> Suffix | None:
    """What kind of file a name is of; None for another."""
    return _SUFFIXES.get(Path(path).suffix.lower())


def check_output(output: Path, source: str, *, overwrite: bool) -> None:
    """Refuse, before any work, a file that cannot take the examples.

    Args:
        output: where they are to go.
        source: where they come from.
        overwrite: whether a file that is there may be replaced.

    Raises:
        ArgumentError: an unknown kind, a folder, a folder that is not there, the input itself, or a file that is there already.
    """
    if suffix_of(output) is None:
        raise ArgumentError(f"--output_file {output}: the end of the name says how it is written; expected {', '.join(_SUFFIXES)}.")
    if Path(source).exists() and output.exists() and output.samefile(source):
        raise ArgumentError(f"{output} is the input itself; name another file, or the examples would be overwritten.")
    if output.is_dir():
        raise ArgumentError(f"{output} is a folder; name a file.")
    if not output.parent.is_dir():
        raise ArgumentError(f"There is no folder {output.parent} to write {output.name} in; make it first.")
    if output.exists() and not overwrite:
        raise ArgumentError(f"{output} is there already. Name another file, or add --overwrite to replace it.")
