"""The public names: one sorted list, its imports, its docstrings, and what type checkers see, agree."""

from __future__ import annotations

import ast
import inspect
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest

import hf_compress

NAMES: dict[str, str] = hf_compress._MODULES


def test_the_list_is_sorted() -> None:
    assert list(NAMES) == sorted(NAMES)
    assert hf_compress.__all__ == [*NAMES, "__version__"]
    assert set(hf_compress.__all__) <= set(dir(hf_compress))


@pytest.mark.parametrize("name", NAMES)
def test_a_public_name_is_there_and_documented(name: str) -> None:
    value = getattr(hf_compress, name)
    assert value is getattr(import_module(NAMES[name]), name)
    assert value.__module__ == NAMES[name], "the list names the module that defines it, not one that passes it on"
    documented = value.__dict__.get("__doc__") if inspect.isclass(value) else inspect.getdoc(value)
    assert documented, f"{name} has no docstring of its own"
    # A dataclass without a docstring is given its signature for one.
    assert not documented.startswith(f"{name}("), f"{name} has no docstring of its own"


def test_type_checkers_see_the_same_names() -> None:
    tree = ast.parse(Path(hf_compress.__file__).read_text(encoding="utf-8"))
    (block,) = [node for node in tree.body if isinstance(node, ast.If)]
    imports = [node for node in block.body if isinstance(node, ast.ImportFrom)]
    assert {alias.asname: node.module for node in imports for alias in node.names} == NAMES


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="'hf_compress' has no attribute 'DistilTrainer'"):
        _ = hf_compress.DistilTrainer  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    "statement",
    [
        "import hf_compress",
        "from hf_compress import CompressionArguments, CompressionError",
        "import hf_compress.cli.app",
        "import hf_compress.layers.strategies",
        "import hf_compress.run",
        "import hf_compress.script_arguments",
    ],
)
def test_torch_and_transformers_wait_until_they_are_used(statement: str) -> None:
    code = f"import sys; {statement}; print(sorted({{'torch', 'transformers', 'datasets', 'matplotlib'}} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.slow
def test_seq2seq_is_not_bound_by_another_name() -> None:
    # `hf-compress run` puts its trainer in place before transformers' Seq2SeqTrainer is defined.
    code = "import sys; from hf_compress import DistillTrainer; print('transformers.trainer_seq2seq' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
