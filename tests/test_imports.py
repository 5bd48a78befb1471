"""Who may import whom: imports point one way, files stay short, and each outside door is in one file.

The package's own imports are read from the source with `ast`, those inside functions too.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from dataclasses import dataclass
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "hf_compress"
MAX_LINES = 400

# Part of the package (a file, or a folder as a whole) -> the parts that it may import. Read from the bottom of the flow to its top.
MAY_IMPORT: dict[str, set[str]] = {
    "errors": set(),
    "worker_memory": set(),
    # what the processes of a run agree on
    "agreement": {"errors"},
    # what models show, and a teacher's of it on disk, which knows neither layers nor losses
    "selected_state": set(),
    "top_logits": set(),
    "signals": {"selected_state", "top_logits"},
    "cache": {"agreement", "errors", "selected_state", "signals", "top_logits", "worker_memory"},
    # layers; what models show, and what compares them
    "layers": {"agreement", "errors"},
    "attention": {"errors"},
    "task": {"attention", "layers", "signals"},
    "losses": {"errors", "layers", "signals", "task", "top_logits"},
    "fsdp": {"errors"},
    # the flags
    "argument_file": {"errors"},
    "argument_values": {"errors"},
    "cache_arguments": {"argument_values", "cache", "errors"},
    "teacher_places": {"errors"},
    "deepspeed_configs": {"argument_values", "errors"},
    # more training data
    "augmentation": {"cache", "errors"},
    # students
    "projection_file": {"errors"},
    "console_log": set(),
    "gradual_drop": {"errors", "layers"},
    # what models show
    "capture": {"attention", "errors", "layers", "selected_state", "signals"},
    "prediction_head": {"errors", "layers"},
    "chunked_logits": {"errors", "layers", "losses", "prediction_head", "signals", "task", "top_logits"},
    "teacher": {"capture", "errors", "layers", "prediction_head", "signals", "task"},
    "teacher_checks": {"errors", "layers", "task"},
    "packed_signals": {"signals", "worker_memory"},
    "cached_teacher": {"cache", "packed_signals", "signals"},
    "teacher_identity": {"cache", "errors", "layers", "signals", "task", "teacher_checks"},
    # distilling
    # distilling
    "projections": {"errors", "layers", "losses", "projection_file"},
    "students": {"errors", "layers", "losses", "projection_file", "projections"},
    "registration": set(),
    "teacher_placement": {"cache", "errors", "layers", "signals", "teacher"},
    "several_teachers": {"cached_teacher", "losses", "signals"},
    # the trainers
    "without_weights": {"errors", "students"},
    # the trainers
    # the trainers
    # the trainers
    "trim_padding": {"task"},
    "loss_log": {"errors", "signals"},
    "task_loss": {"errors", "layers", "task"},
    "teacher_score": {"layers", "signals", "task", "task_loss"},
    # what people call
    "scripts": set(),
    "process_checks": {"agreement", "cache", "errors", "losses", "teacher_identity", "teacher_places"},
    "layer_drop_arguments": {"argument_values", "errors"},
    "arguments": {"argument_file", "argument_values", "cache_arguments", "errors", "layer_drop_arguments", "losses", "teacher_places"},
    "script_arguments": {"argument_file", "argument_values", "arguments", "cache_arguments", "deepspeed_configs", "errors"},
    "callbacks": {"arguments", "console_log", "errors", "gradual_drop", "layers"},
    "training_arguments": {"arguments", "callbacks", "deepspeed_configs"},
    "teacher_cache_budget": {"arguments", "cache", "errors", "signals"},
    "teacher_cache_run": {
        "agreement",
        "arguments",
        "cache",
        "errors",
        "layers",
        "signals",
        "task",
        "teacher",
        "teacher_cache_budget",
        "teacher_identity",
    },
    "teacher_side": {
        "arguments",
        "cache",
        "cached_teacher",
        "errors",
        "layers",
        "losses",
        "signals",
        "task",
        "teacher",
        "teacher_checks",
        "teacher_identity",
        "teacher_placement",
    },
    "teacher_on_miss": {"arguments", "cache", "cached_teacher", "errors", "task", "teacher", "teacher_cache_run", "teacher_identity"},
    "progressive": {"arguments", "errors", "layers", "losses"},
    "distillation": {
        "capture",
        "chunked_logits",
        "errors",
        "layers",
        "losses",
        "prediction_head",
        "progressive",
        "projections",
        "several_teachers",
        "signals",
        "task",
        "teacher",
    },
    "phases": {"arguments", "distillation", "errors", "layers", "progressive"},
    "trials": {"arguments", "callbacks", "errors"},
    "card": {
        "arguments",
        "cache",
        "cached_teacher",
        "distillation",
        "errors",
        "layers",
        "losses",
        "projections",
        "several_teachers",
        "signals",
        "students",
        "task",
        "task_loss",
        "teacher",
        "without_weights",
    },
    "adapter_off": {"arguments", "capture", "errors", "layers", "losses", "signals", "task", "teacher", "teacher_side"},
    "run_checks": {"adapter_off", "arguments", "deepspeed_configs", "errors", "fsdp", "layers", "losses"},
    "given_teachers": {
        "adapter_off",
        "arguments",
        "cache_arguments",
        "cached_teacher",
        "errors",
        "layers",
        "losses",
        "run_checks",
        "several_teachers",
        "signals",
        "task",
        "teacher_identity",
        "teacher_on_miss",
        "teacher_placement",
        "teacher_places",
        "teacher_score",
        "teacher_side",
    },
    "teacher_to_disk": {
        "arguments",
        "cache",
        "cached_teacher",
        "given_teachers",
        "layers",
        "losses",
        "signals",
        "teacher",
        "teacher_cache_run",
        "teacher_side",
    },
    "student_files": {"distillation", "layers"},
    "trainer": {
        "agreement",
        "arguments",
        "cached_teacher",
        "callbacks",
        "card",
        "chunked_logits",
        "console_log",
        "distillation",
        "given_teachers",
        "gradual_drop",
        "loss_log",
        "losses",
        "phases",
        "process_checks",
        "run_checks",
        "several_teachers",
        "student_files",
        "task",
        "task_loss",
        "teacher_on_miss",
        "teacher_to_disk",
        "trials",
        "trim_padding",
    },
    "trainer_seq2seq": {"errors", "trainer"},
    "bound_trainer": {
        "argument_values",
        "arguments",
        "callbacks",
        "card",
        "deepspeed_configs",
        "errors",
        "gradual_drop",
        "trainer",
        "trainer_seq2seq",
        "trials",
        "trim_padding",
    },
    "run": {"bound_trainer", "console_log", "errors", "script_arguments"},
    "report": {
        "argument_file",
        "argument_values",
        "arguments",
        "cache",
        "cache_arguments",
        "errors",
        "layers",
        "losses",
        "script_arguments",
        "signals",
        "students",
        "task",
        "teacher_identity",
        "teacher_places",
        "teacher_side",
        "trainer",
        "without_weights",
    },
    "cli": {
        "argument_values",
        "arguments",
        "augmentation",
        "cache",
        "cache_arguments",
        "card",
        "errors",
        "layers",
        "losses",
        "projections",
        "report",
        "run",
        "scripts",
        "signals",
        "students",
        "task",
        "teacher_checks",
        "teacher_identity",
        "teacher_side",
        "without_weights",
    },
}

# Imports inside functions are for commands that must answer before torch is loaded, and for a trainer that must not be loaded early.
MAY_IMPORT_LATE = {"cli", "run"}

# A name of transformers -> the only files that may import it (an upstream change lands there).
DOORS = {
    "Trainer": {"trainer", "scripts.run_glue", "scripts.run_mlm"},
    "Seq2SeqTrainer": {"trainer_seq2seq"},
    "TrainerCallback": {"callbacks"},
}


@dataclass(frozen=True)
class Import:
    """One import statement: the module it is in, the one it names, the names taken, and whether a function holds it."""

    source: str
    target: str
    names: tuple[str, ...]
    late: bool


def module_name(path: Path) -> str:
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def part(module: str) -> str:
    return module.split(".")[0]


def imports_of(path: Path) -> Iterator[Import]:
    source = module_name(path)
    tree = ast.parse(path.read_text(encoding="utf-8"))
    late = {
        id(inner)
        for node in ast.walk(tree)
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        for inner in ast.walk(node)
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: a relative import; write the whole name"
            yield Import(source, node.module or "", tuple(alias.name for alias in node.names), id(node) in late)
        elif isinstance(node, ast.Import):
            for alias in node.names:
                yield Import(source, alias.name, (), id(node) in late)


FILES = sorted(PACKAGE.rglob("*.py"))
TEST_FILES = sorted(Path(__file__).parent.rglob("*.py"))
MODULES = {module_name(path) for path in FILES}
IMPORTS = [found for path in FILES if path != PACKAGE / "__init__.py" for found in imports_of(path)]


def own_modules(found: Import) -> Iterator[str]:
    """The modules of this package that an import statement loads, without the package's name."""
    if found.target != "hf_compress" and not found.target.startswith("hf_compress."):
        return
    base = found.target.removeprefix("hf_compress").lstrip(".")
    below = [f"{base}.{name}".lstrip(".") for name in found.names]
    modules = [name for name in below if name in MODULES]
    if len(modules) < len(below) or not below:
        public = set(found.names) - {"__version__"}
        assert base or not public, f"{found.source} imports {public} from hf_compress; take it from the module that defines it"
        modules.append(base)
    yield from filter(None, modules)


def test_the_table_names_every_part_and_no_other() -> None:
    assert {part(module) for module in MODULES} - {""} == set(MAY_IMPORT)


def test_the_table_points_one_way() -> None:
    listed: list[str] = []
    for name, allowed in MAY_IMPORT.items():
        assert allowed <= set(listed), f"{name} may import only what stands above it in the table"
        listed.append(name)


def test_imports_keep_to_the_table() -> None:
    wrong = sorted(
        f"{found.source} imports {module}"
        for found in IMPORTS
        for module in own_modules(found)
        if part(module) != part(found.source) and part(module) not in MAY_IMPORT[part(found.source)]
    )
    assert wrong == []


def test_no_circle_of_modules() -> None:
    graph: dict[str, set[str]] = {module: set() for module in MODULES}
    for found in IMPORTS:
        graph[found.source].update(own_modules(found))
    try:
        list(TopologicalSorter(graph).static_order())
    except CycleError as error:
        pytest.fail(f"modules import each other in a circle: {' -> '.join(error.args[1])}")


def test_no_import_of_our_own_hides_in_a_function() -> None:
    wrong = sorted(
        f"{found.source} imports {module} inside a function"
        for found in IMPORTS
        for module in own_modules(found)
        if found.late and part(found.source) not in MAY_IMPORT_LATE
    )
    assert wrong == []


def test_one_file_takes_the_names_that_are_imported_when_they_are_used() -> None:
    """The recipes, so that flags can list them without torch; whoever else imports a name says from where."""
    assert {found.source for found in IMPORTS if found.target == "hf_compress" and not found.names} == {"losses.recipes"}


@pytest.mark.parametrize("name", DOORS)
def test_each_door_to_transformers_is_in_one_file(name: str) -> None:
    importers = {found.source for found in IMPORTS if found.target.split(".")[0] == "transformers" and name in found.names}
    assert importers == DOORS[name]


def test_the_projects_script_knows_nothing_of_the_package() -> None:
    assert [found for found in IMPORTS if part(found.source) == "scripts" and found.target.startswith("hf_compress")] == []


@pytest.mark.parametrize("path", [*FILES, *TEST_FILES], ids=lambda path: str(path.relative_to(PACKAGE.parent)))
def test_a_file_is_short_and_named_for_one_idea(path: Path) -> None:
    lines = len(path.read_text(encoding="utf-8").splitlines())
    assert lines <= MAX_LINES, f"{lines} lines: split it"
    assert path.stem not in {"utils", "util", "common", "base", "core", "helpers", "misc"}


def test_every_folder_is_a_package() -> None:
    folders = {path.parent for path in FILES}
    assert [str(folder) for folder in sorted(folders) if not (folder / "__init__.py").exists()] == []
