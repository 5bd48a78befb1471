"""Flags from a file: JSON or YAML, one mapping from names to values."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import yaml

from hf_compress.errors import ArgumentError

SUFFIXES = (".json", ".yaml", ".yml")


def flag_name(key: object) -> str:
    """A key as the flag is called in Python: no dashes in front, underscores within."""
    return str(key).lstrip("-").replace("-", "_")


def read_argument_file(path: str | Path, *, flag: str = "hf_compress_config") -> dict[str, Any]:
    """Read a mapping from names of flags (in either spelling) to values.

    Args:
        path: a .json, .yaml or .yml file.
        flag: the flag that named the file, for messages.

    Raises:
        ArgumentError: no such file, another kind of file, not well-formed, or no mapping.
    """
    return {flag_name(key): value for key, value in read_mapping(path, flag=flag).items()}


def read_mapping(path: str | Path, *, flag: str) -> dict[Any, Any]:
    """The same with the keys as they stand in the file."""
    file = Path(path)
    if file.suffix.lower() not in SUFFIXES:
        raise ArgumentError(f"--{flag}: {path} is neither JSON nor YAML by its name; it must end in {', '.join(SUFFIXES)}.")
    try:
        text = file.read_text(encoding="utf-8")
    except OSError as error:
        raise ArgumentError(f"--{flag}: cannot read {path} ({error.strerror}).") from error
    try:
        content = json.loads(text) if file.suffix.lower() == ".json" else yaml.safe_load(text)
    except (json.JSONDecodeError, yaml.YAMLError) as error:
        raise ArgumentError(f"--{flag}: {path} cannot be read: {error}.") from error
    if not isinstance(content, dict):
        raise ArgumentError(f"--{flag}: {path} holds a {type(content).__name__}; expected names of flags with values.")
    return content
