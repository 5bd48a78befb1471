"""Flags as Hugging Face spells them: `--num_hidden_layers`, and `--num-hidden-layers` as well; none abbreviated."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any, NoReturn

from hf_compress.errors import ArgumentError


class FlagParser(argparse.ArgumentParser):
    """An argparse parser with both spellings of each flag, whose errors are those of hf_compress."""

    def __init__(self, command: str, description: str) -> None:
        super().__init__(prog=f"hf-compress {command}", description=description, allow_abbrev=False)
        self.flag("traceback", action="store_true", help="Show where in the code an error of hf_compress arose.")

    def flag(self, name: str, *others: str, **settings: Any) -> None:
        """Add `--name`, its spelling with dashes, and other names."""
        spellings = [f"--{name}", f"--{name.replace('_', '-')}", *others]
        self.add_argument(*dict.fromkeys(spellings), **settings)

    def parse(self, argv: Sequence[str]) -> argparse.Namespace:
        """Read the command line.

        Raises:
            ArgumentError: a flag is unknown, lacks its value, or has one of the wrong kind.
            SystemExit: after `--help`.
        """
        return self.parse_args(list(argv))

    def error(self, message: str) -> NoReturn:
        """Raise in place of argparse's own exit."""
        raise ArgumentError(f"{message}. `{self.prog} --help` shows the flags.")
