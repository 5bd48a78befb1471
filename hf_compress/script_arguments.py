"""Whose flag is it? The command line of `hf-compress run`, split into what hf_compress takes and what the script gets. No torch here.

    [--local_rank=N] SCRIPT --learning_rate 3e-5 --layer_drop_strategy top --output_dir out
                            `------ script ----' `------- hf_compress ----' `-- script --'

A value given on the command line wins over `--hf_compress_config FILE`, and that over the script's own argument file (a single JSON or
YAML file in place of flags), whose keys are split in the same way.
"""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NoReturn

import yaml

from hf_compress.argument_file import SUFFIXES, flag_name, read_argument_file, read_mapping
from hf_compress.argument_values import nearest_name
from hf_compress.arguments import FIELDS, SWITCHES, CompressionArguments, compression_values
from hf_compress.cache_arguments import ALIASES
from hf_compress.deepspeed_configs import ACCELERATE_VARIABLE, named_config, with_named_config
from hf_compress.errors import ArgumentError, ScriptError

USAGE = "hf-compress run SCRIPT [flags of hf_compress and of the script, in any order]"
PACKAGED_SCRIPTS = {name: Path(__file__).parent / "scripts" / f"run_{name}.py" for name in ("glue", "mlm")}


@dataclass(frozen=True)
class ScriptRequest:
    """A script, what it is run with, and what hf_compress adds.

    Attributes:
        script: the file to run; None where only help was asked for.
        script_arguments: its `sys.argv[1:]`, except for an argument file (below).
        argument_file: the keys of its own argument file that remain for it; None where it has none, or can read it as it is.
        compression: the flags of hf_compress.
        given: the names of the flags that were given, wherever.
        traceback: show the whole traceback of an error of hf_compress.
        help: show the flags of hf_compress, then the script's.
    """

    script: Path | None
    script_arguments: tuple[str, ...]
    argument_file: dict[str, Any] | None
    compression: CompressionArguments
    given: tuple[str, ...]
    traceback: bool
    help: bool


class _Parser(argparse.ArgumentParser):
    """An argparse parser whose errors are ours."""

    def error(self, message: str) -> NoReturn:
        raise ArgumentError(message[:1].upper() + message[1:] + ".")


def flag_parser() -> argparse.ArgumentParser:
    """The parser of hf_compress's own flags: each with underscores or dashes, none abbreviated, values left as text."""
    parser = _Parser(
        prog="hf-compress run",
        usage=USAGE,
        description="Run a script built on transformers.Trainer, with layers dropped or a teacher added. Dashes do for underscores.",
        add_help=False,
        allow_abbrev=False,
    )
    group = parser.add_argument_group("flags of hf_compress")
    for name, field in FIELDS.items():
        settings: dict[str, Any] = {"metavar": "VALUE"}
        if name in SWITCHES:
            settings = {"metavar": "BOOL", "type": _truth, "nargs": "?", "const": True}
        group.add_argument(f"--{name}", help=field.metadata["help"], default=argparse.SUPPRESS, **settings)
        if "_" in name:
            dashed = f"--{name.replace('_', '-')}"
            group.add_argument(dashed, dest=name, help=argparse.SUPPRESS, default=argparse.SUPPRESS, **settings)
    for alias, name in ALIASES.items():
        group.add_argument(f"--{alias}", dest=name, metavar="VALUE", help=f"The same as --{name}.", default=argparse.SUPPRESS)
    group.add_argument("--traceback", action="store_true", help="Show where in the code an error of hf_compress arose.")
    group.add_argument("--help", action="store_true", help="Show this, then the script's own help (-h as well).")
    return parser


def _truth(text: str) -> bool:
    """The spellings that HfArgumentParser knows."""
    if text.lower() in ("yes", "true", "t", "y", "1"):
        return True
    if text.lower() in ("no", "false", "f", "n", "0"):
        return False
    raise argparse.ArgumentTypeError(f"{text} is neither true nor false")


def parse_command_line(argv: Sequence[str]) -> ScriptRequest:
    """Split the command line.

    Args:
        argv: what follows `hf-compress run`.

    Raises:
        ScriptError: no script, or one that is not there.
        ArgumentError: a flag of hf_compress is unknown, malformed, or contradicts another, or DeepSpeed would refuse its config.
    """
    launcher_flags, rest = _launcher_flags(argv)
    if not rest or rest[0] in ("-h", "--help"):
        if not rest:
            raise ScriptError(f"No script was named. Usage: {USAGE}")
        return ScriptRequest(None, (), None, CompressionArguments(), (), traceback=False, help=True)
    script = find_script(rest[0])
    found, remaining = flag_parser().parse_known_args(list(rest[1:]))
    on_command_line = vars(found)
    traceback, wants_help = on_command_line.pop("traceback"), on_command_line.pop("help") or "-h" in remaining
    remaining = list(with_named_config(remaining))
    if Path(os.environ.get(ACCELERATE_VARIABLE, "")).is_file():
        named_config(os.environ[ACCELERATE_VARIABLE], flag="deepspeed_config_file")
    in_script_file, argument_file = _split_argument_file(remaining)
    in_config: dict[str, Any] = {}
    config = on_command_line.pop("hf_compress_config", in_script_file.pop("hf_compress_config", None))
    if config is not None:
        in_config = compression_values(read_argument_file(config), source=config)
    values = {**in_script_file, **in_config, **on_command_line}
    return ScriptRequest(
        script=script,
        script_arguments=(*launcher_flags, *remaining),
        argument_file=argument_file,
        compression=CompressionArguments(**values),
        given=tuple(name for name in FIELDS if name in values),
        traceback=traceback,
        help=wants_help,
    )


def _launcher_flags(argv: Sequence[str]) -> tuple[list[str], list[str]]:
    """Take off the `--local_rank=N` that a launcher puts in front of the script."""
    rest = list(argv)
    taken: list[str] = []
    while rest and rest[0].startswith(("--local_rank", "--local-rank")):
        taken.append(rest.pop(0))
        if "=" not in taken[-1] and rest:
            taken.append(rest.pop(0))
    return taken, rest


def find_script(name: str) -> Path:
    """The file of a script: a path, or the name of a packaged one.

    Raises:
        ScriptError: it is a flag, a folder, or nothing.
    """
    if name.startswith("-"):
        raise ScriptError(f"The script comes first, before any flag, but '{name}' was found. Usage: {USAGE}")
    path = Path(name)
    if path.is_file():
        return path
    if name in PACKAGED_SCRIPTS:
        return PACKAGED_SCRIPTS[name]
    if path.is_dir():
        raise ScriptError(f"{name} is a folder; name the script in it.")
    if len(path.parts) == 1 and not path.suffix:
        raise ScriptError(
            f"There is no script '{name}' here, and none of that name comes with hf_compress ({', '.join(PACKAGED_SCRIPTS)})."
            f"{nearest_name(name, PACKAGED_SCRIPTS)}"
        )
    near = get_close_matches(path.name, [each.name for each in path.parent.glob("*.py")], n=1) if path.parent.is_dir() else []
    hint = f" Did you mean {path.parent / near[0]}?" if near else ""
    raise ScriptError(f"There is no script {name}.{hint} `hf-compress run glue` and `run mlm` run those that come with hf_compress.")


def _split_argument_file(remaining: Sequence[str]) -> tuple[dict[str, Any], dict[str, Any] | None]:
    """Ours and the script's of the keys in the script's own argument file; ({}, None) where it has none, or can keep it as it is."""
    if len(remaining) != 1 or remaining[0].startswith("-") or Path(remaining[0]).suffix.lower() not in SUFFIXES:
        return {}, None
    try:
        values = read_mapping(remaining[0], flag="the script's argument file")
    except ArgumentError:
        return {}, None  # the script's own error says it best
    names = {**dict.fromkeys(FIELDS), **dict.fromkeys(ALIASES)}
    ours = {flag_name(key): value for key, value in values.items() if flag_name(key) in names}
    ours = {ALIASES.get(name, name): value for name, value in ours.items()}
    theirs = {key: named_config(value) if key == "deepspeed" else value for key, value in values.items() if flag_name(key) not in names}
    return ours, theirs if ours or theirs != values else None


@contextmanager
def script_command_line(request: ScriptRequest) -> Iterator[list[str]]:
    """The script's `sys.argv`; while this lasts, a split argument file stands, without our keys, in a temporary folder."""
    arguments = list(request.script_arguments)
    if request.argument_file is None:
        yield [str(request.script), *arguments]
        return
    with TemporaryDirectory(prefix="hf_compress_") as folder:
        split = Path(folder) / Path(arguments[-1]).name
        is_json = split.suffix.lower() == ".json"  # YAML reads JSON's 1e-05 as text, so each has its own writer
        text = json.dumps(request.argument_file, indent=2) if is_json else yaml.safe_dump(request.argument_file, sort_keys=False)
        split.write_text(text, encoding="utf-8")
        yield [str(request.script), *arguments[:-1], str(split)]


def misspelt_flags(request: ScriptRequest) -> list[str]:
    """One hint for each argument of the script that looks like a flag of hf_compress with a slip of the pen."""
    hints = []
    for argument in request.script_arguments:
        name = argument.lstrip("-").partition("=")[0].replace("-", "_")
        near = get_close_matches(name, list(FIELDS), n=1, cutoff=0.88) if argument.startswith("--") else []
        if near:
            hints.append(f"--{name} was left to the script; did you mean --{near[0]} of hf_compress?")
    return hints
