"""Tells transformers of the architectures of this package, so that `from_pretrained` loads them.

    import hf_compress           transformers' table of configs gets, for each model type of ours, a stand-in
                                 (now, or right after the module with that table is imported)
    from_pretrained(student)     finds the stand-in, which imports students/pruned_config: the config classes take its place
    the first config is made     students/pruned_models is imported and registers the models

`import hf_compress` alone must be cheap: transformers' automatic classes take seconds to import, and torch with them. And nothing of
transformers can be imported while its own modules are on their way, since they import each other in circles. So each step waits for the
one that needs it.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib import import_module
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from types import ModuleType
from typing import Any

CONFIG_TABLE = "transformers.models.auto.configuration_auto"
OUR_CONFIGS = "hf_compress.students.pruned_config"
MODEL_TYPES = ("pruned_bert", "pruned_roberta", "pruned_distilbert")


def register_architectures() -> None:
    """Register the package's own architectures with transformers, now or as soon as it can be done."""
    table = sys.modules.get(CONFIG_TABLE)
    if table is not None:
        _fill_in(table)
    elif not any(isinstance(finder, _Waiting) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Waiting())


def _fill_in(table: ModuleType) -> None:
    """Put the stand-ins into transformers' table of configs."""
    for model_type in MODEL_TYPES:
        if model_type not in table.CONFIG_MAPPING:
            table.CONFIG_MAPPING.register(model_type, _StandIn(model_type))


class _StandIn:
    """In the place of a config class until something is asked of it: then the class is imported, and answers."""

    def __init__(self, model_type: str) -> None:
        self._model_type = model_type

    def __reduce__(self) -> Any:
        return _StandIn, (self._model_type,)  # copied and pickled as what it is

    def __getattr__(self, name: str) -> Any:
        return getattr(self._class(), name)

    def __call__(self, *arguments: Any, **options: Any) -> Any:
        return self._class()(*arguments, **options)

    def _class(self) -> Any:
        import_module(OUR_CONFIGS)  # registers the classes in our place
        found = sys.modules[CONFIG_TABLE].CONFIG_MAPPING[self._model_type]
        assert not isinstance(found, _StandIn)
        return found


class _Waiting(MetaPathFinder):
    """Waits for transformers' table of configs to be imported; then it is gone."""

    def __init__(self) -> None:
        self._aside = False  # while the others are asked

    def find_spec(self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None) -> ModuleSpec | None:
        """Pass over every module but that one, which its usual loader loads."""
        if fullname != CONFIG_TABLE or self._aside:
            return None
        self._aside = True
        try:
            spec = find_spec(fullname)
        finally:
            self._aside = False
        if spec is not None and spec.loader is not None:
            run = spec.loader.exec_module

            def run_and_fill_in(module: ModuleType) -> None:
                run(module)
                _fill_in(module)
                if self in sys.meta_path:  # not before: who looks for a module need not import it
                    sys.meta_path.remove(self)

            spec.loader.exec_module = run_and_fill_in  # type: ignore[method-assign]
        return spec
