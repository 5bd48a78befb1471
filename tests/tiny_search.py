"""A stand-in for optuna, as far as transformers' own search calls it: trials whose values are listed beforehand."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.machinery import ModuleSpec
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest


@dataclass
class Trial:
    """A trial whose suggestions are known."""

    number: int
    values: Mapping[str, Any]
    params: dict[str, Any] = field(default_factory=dict)
    value: float = 0.0

    def suggest(self, name: str) -> Any:
        """What optuna's `suggest_float` and its kin give: the same for the same name."""
        return self.params.setdefault(name, self.values[name])


@dataclass
class Study:
    """The trials in order."""

    listed: Sequence[Mapping[str, Any]]
    trials: list[Trial] = field(default_factory=list)

    def optimize(self, objective: Callable[[Trial], float], n_trials: int, **settings: Any) -> None:
        for number, values in enumerate(self.listed[:n_trials]):
            trial = Trial(number, values)
            trial.value = objective(trial)
            self.trials.append(trial)

    def _is_multi_objective(self) -> bool:
        return False

    @property
    def best_trial(self) -> Trial:
        return min(self.trials, key=lambda trial: trial.value)


def install(monkeypatch: pytest.MonkeyPatch, listed: Sequence[Mapping[str, Any]]) -> None:
    """Let `import optuna` find the stand-in, whose study has these trials."""
    module = ModuleType("optuna")
    module.__spec__ = ModuleSpec("optuna", None)
    kinds = SimpleNamespace(BaseTrial=Trial)
    vars(module).update(Trial=Trial, trial=kinds, create_study=lambda **settings: Study(listed))
    monkeypatch.setitem(sys.modules, "optuna", module)
