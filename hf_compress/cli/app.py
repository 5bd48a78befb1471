"""`hf-compress COMMAND ...`: finds the command, and turns an error of hf_compress into one line and exit code 2."""

from __future__ import annotations

import sys
import traceback
from collections.abc import Callable, Sequence
from importlib import import_module

from hf_compress import __version__
from hf_compress.argument_values import nearest_name
from hf_compress.errors import CompressionError

# Command -> what it is for. Each is the function `main(argv) -> int` of the module of that name.
COMMANDS = {
    "run": "run a script that knows nothing of hf_compress, with layers dropped or a teacher added",
    "student": "make a student out of a teacher: of its layers, or of another width",
    "prune": "make a student of a teacher's most important heads, neurons and layers",
    "drop": "drop layers of a model",
    "augment": "more training data: copies of examples in which words were replaced",
    "cache": "look at a teacher on disk, check it, price one, make a smaller one of it, put it on the hub",
    "study": "train with more and less of the teacher's hidden states: how much is worth how much",
    "demo": "train, drop and distil on a small corpus, offline, in minutes: a table, a picture, a report",
    "version": "print the version",
}
USAGE_ERROR = 2


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command.

    Args:
        argv: what follows `hf-compress`; by default `sys.argv[1:]`.

    Returns:
        The exit code: 0, or 2 after an error of hf_compress, which is printed (`--traceback` shows where it arose).
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    if not arguments or arguments[0] in ("-h", "--help"):
        print(help_text())
        return 0 if arguments else USAGE_ERROR
    name, rest = arguments[0], arguments[1:]
    if name == "--version":
        name = "version"
    if name not in COMMANDS:
        print(f"hf-compress: error: there is no command '{name}'.{nearest_name(name, COMMANDS)}\n\n{help_text()}", file=sys.stderr)
        return USAGE_ERROR
    if name == "version":
        print(__version__)
        return 0
    command: Callable[[Sequence[str]], int] = import_module(f"hf_compress.cli.{name}").main
    try:
        return command(rest)
    except CompressionError as error:
        if "--traceback" in rest:
            traceback.print_exc()
        print(f"hf-compress: error: {error}", file=sys.stderr)
        return USAGE_ERROR


def help_text() -> str:
    """What `hf-compress --help` prints."""
    lines = [f"  {name:<9}{purpose}" for name, purpose in COMMANDS.items()]
    return "\n".join(
        [
            "usage: hf-compress COMMAND ...",
            "",
            "Layer dropping and distillation for scripts built on Hugging Face's Trainer.",
            "",
            *lines,
            "",
            "`hf-compress COMMAND --help` shows a command's flags.",
        ]
    )


if __name__ == "__main__":
    sys.exit(main())
