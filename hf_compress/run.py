"""Run a script that knows nothing of hf_compress, with its flags added: `hf-compress run SCRIPT ...`, or `python -m hf_compress.run`.

    argv -> ScriptRequest (script_arguments) -> BoundTrainer (bound_trainer) -> the script, as `__main__`

Launchers start it as a module, each in its own way:

    torchrun -m hf_compress.run SCRIPT ...
    accelerate launch -m hf_compress.run SCRIPT ...
    deepspeed --module hf_compress.run SCRIPT ...

The script's own errors and exit code pass through. An error of hf_compress is one line and exit code 2; `--traceback` shows the rest.
"""

from __future__ import annotations

import gc
import os
import runpy
import sys
import traceback
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

from hf_compress.console_log import console_log
from hf_compress.errors import CompressionError, ScriptError
from hf_compress.script_arguments import ScriptRequest, flag_parser, misspelt_flags, parse_command_line, script_command_line

REFUSED = 2


def main(argv: Sequence[str] | None = None) -> int:
    """Run a script with the flags of hf_compress.

    Args:
        argv: what follows `hf-compress run`; by default `sys.argv[1:]`.

    Returns:
        0, or 2 after an error of hf_compress, which is printed.

    Raises:
        SystemExit: the script exits.
        Exception: whatever else the script raises.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    try:
        request = parse_command_line(arguments)
        if request.help:
            print(flag_parser().format_help(), flush=True)
        if request.script is not None:
            run_script(request)
    except CompressionError as error:
        if "--traceback" in arguments:
            traceback.print_exc()
        print(f"hf-compress: error: {error}", file=sys.stderr)
        return REFUSED
    return 0


def run_script(request: ScriptRequest) -> None:
    """Run the script as `__main__`, with the flags bound into the Trainer that it finds.

    Raises:
        ScriptError: the script ended without making a Trainer, so flags that were given had no effect.
        CompressionError: anything else that hf_compress refuses.
    """
    assert request.script is not None
    with ExitStack() as stack:
        stack.enter_context(console_log())
        script_argv = stack.enter_context(script_command_line(request))
        if request.help:
            print(f"flags of {request.script}:\n", flush=True)
            script_argv = [script_argv[0], "--help"]
        stack.enter_context(_as_main_script(request.script, script_argv))
        bound = None
        if request.given and not request.help:
            from hf_compress.bound_trainer import installed, trainer_of  # transformers is loaded only once the flags are known to be right

            bound = trainer_of(request.compression)
            stack.enter_context(installed(bound))
        if not request.help and os.environ.get("RANK", "0") == "0":
            _note_before(request)
        try:
            runpy.run_path(str(request.script), run_name="__main__")
        except SystemExit as exit_request:
            if exit_request.code not in (None, 0):
                _hint(request)
                raise
            if request.help:
                raise
        except CompressionError:
            raise
        except Exception:
            _hint(request)
            raise
        _leave_process_group()
    if bound is not None and not bound.constructed:
        flags = ", ".join(f"--{name}" for name in request.given)
        raise ScriptError(
            f"{request.script} ended without making a transformers.Trainer, so {flags} had no effect. A script with a training loop of its "
            "own calls drop_layers(model, ...)."
        )


def _note_before(request: ScriptRequest) -> None:
    """Before the script starts: it may pass over what it does not know, and then a misspelt flag would show nowhere."""
    _hint(request)
    if not request.given:
        print(f"hf-compress: note: no flag of hf_compress was given, so {request.script} runs as it is.", file=sys.stderr, flush=True)


def _hint(request: ScriptRequest) -> None:
    """Say which of the script's arguments look like misspelt flags of ours; before it starts, and again after it failed."""
    for hint in misspelt_flags(request):
        print(f"hf-compress: note: {hint}", file=sys.stderr, flush=True)


def _leave_process_group() -> None:
    """Free what the script left (its Trainer, with DDP's reducer) and end the process group, if there is one.

    At Python's shutdown a thread of gloo that still frees tensors may abort the process, and the launcher then calls a run failed that
    was not.
    """
    distributed = sys.modules.get("torch.distributed")
    if distributed is not None and distributed.is_available() and distributed.is_initialized():
        gc.collect()
        distributed.destroy_process_group()


@contextmanager
def _as_main_script(script: Path, script_argv: list[str]) -> Iterator[None]:
    """Give the script the `sys.argv` and the first place on `sys.path` that Python itself would.

    What it imports from beside it (run_qa.py its trainer_qa.py) is bound to this run's Trainer, so another run in this process shall import
    it anew.
    """
    argv, path, folder = sys.argv, list(sys.path), script.resolve().parent
    loaded = set(sys.modules)
    sys.argv = script_argv
    sys.path.insert(0, str(folder))
    try:
        yield
    finally:
        sys.argv = argv
        sys.path[:] = path
        for name in set(sys.modules) - loaded:
            file = getattr(sys.modules[name], "__file__", None)
            if file is not None and Path(file).parent == folder:
                del sys.modules[name]


if __name__ == "__main__":
    sys.exit(main())
