"""The trials of a `hyperparameter_search` set flags of hf_compress as they set those of transformers.

hp_space(trial) -> {"learning_rate": 3e-5, "distill_temperature": 4.0, "num_layers_to_drop": 2}
                      transformers sets it    before the student is built: its layers, its losses
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from difflib import get_close_matches
from typing import Any

from transformers.trainer_utils import HPSearchBackend

from hf_compress.arguments import FIELDS, LOSS_FLAGS, CompressionArguments
from hf_compress.callbacks import DROP_FLAGS, LayerDropCallback, offer_examples
from hf_compress.errors import ArgumentError

# What a trial may set; all else is the same for all of them, as the one teacher is.
SEARCHABLE = (*LOSS_FLAGS, *DROP_FLAGS, "trim_padding")


def values_of(trainer: Any, trial: Any) -> dict[str, Any]:
    """What a trial sets, by name; empty where there is no search.

    Args:
        trainer: a Trainer in `hyperparameter_search`.
        trial: optuna's, which gives the same values each time it is asked; of other backends the values themselves.
    """
    if trial is None or trainer.hp_search_backend is None:
        return {}
    return dict(trainer.hp_space(trial) if trainer.hp_search_backend == HPSearchBackend.OPTUNA else trial)


class TrialFlags:
    """A trainer's flags, as each of its trials sets them, and the callback that drops layers as they say.

    Args:
        flags: the run's. The training arguments' own are set as a trial sets them, as transformers sets its own; others, which several
            trainers may hold, are copied.
        args: the training arguments.
    """

    def __init__(self, flags: CompressionArguments, args: Any) -> None:
        self.flags, self._copies = flags, flags is not args
        self._before: dict[str, Any] | None = None
        self.callbacks = self._asked_for()

    def take(self, trainer: Any, trial: Any, *, distils: bool) -> CompressionArguments:
        """Set what a trial says, the rest as it was before the search; without a trial what was set on the training arguments by hand.

        Args:
            trainer: whose callbacks are renewed.
            trial: of a search; None outside of one.
            distils: whether the trainer has a teacher or losses.

        Returns:
            The flags in force.

        Raises:
            ArgumentError: a flag that is the same for all trials, a name that is nearly one of ours, a value that a flag cannot have, or
                a flag of the distillation where there is none.
        """
        values = values_of(trainer, trial)
        own = {name: value for name, value in values.items() if name in FIELDS}
        if trial is None and not isinstance(trainer.args, CompressionArguments):
            # The best trial's values, as one sets them on the training arguments after a search.
            own = {name: value for name, value in vars(trainer.args).items() if name in FIELDS}
        _refuse(values, own, trainer.args, distils=distils)
        if not own and self._before is None:
            return self.flags
        if self._before is None:
            self.flags = copy.copy(self.flags) if self._copies else self.flags
            self._before = {name: getattr(self.flags, name) for name in SEARCHABLE}
        given = {name: getattr(self.flags, name) for name in FIELDS if name != "hf_compress_config"}
        checked = CompressionArguments(**(given | (self._before if values else {}) | own))
        for name in SEARCHABLE:
            setattr(self.flags, name, getattr(checked, name))
        self._renew_callbacks(trainer)
        return self.flags

    def _asked_for(self) -> list[LayerDropCallback]:
        return [LayerDropCallback.from_arguments(self.flags)] if self.flags.wants_layer_drop or self.flags.wants_freezing else []

    def _renew_callbacks(self, trainer: Any) -> None:
        handler, old = trainer.callback_handler, self.callbacks
        self.callbacks = self._asked_for()
        handler.callbacks = [each for each in handler.callbacks if each not in old] + self.callbacks
        data = {"eval_dataset": trainer.eval_dataset, "train_dataset": trainer.train_dataset}
        offer_examples(self.callbacks, {**data, "data_collator": trainer.data_collator})


@contextmanager
def flags_left_out(trainer: Any, trial: Any) -> Iterator[Any]:
    """While transformers sets a trial's values: without those of hf_compress, of which it would warn, or which it would turn into text."""
    if trial is None or trainer.hp_search_backend is None:
        yield trial
    elif trainer.hp_search_backend == HPSearchBackend.OPTUNA:
        space: Callable[[Any], dict[str, Any]] = trainer.hp_space
        trainer.hp_space = lambda asked: _others(space(asked))
        try:
            yield trial
        finally:
            trainer.hp_space = space
    else:
        yield _others(trial)


def _others(values: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in values.items() if name not in FIELDS}


def _refuse(values: Mapping[str, Any], own: Mapping[str, Any], args: Any, *, distils: bool) -> None:
    """Refuse flags that a trial cannot set, and a misspelt one; names of something else may be for a `model_init` that takes the trial."""
    if fixed := [name for name in own if name not in SEARCHABLE]:
        raise ArgumentError(
            f"The hyperparameters set --{', --'.join(fixed)}, which is the same for all trials: the teacher is loaded once. A search may "
            f"set {', '.join(SEARCHABLE)}."
        )
    if void := [name for name in own if name in LOSS_FLAGS and not distils]:
        raise ArgumentError(f"The hyperparameters set --{', --'.join(void)}, and this run has no teacher: it trains on the labels alone.")
    for name in values:
        near = get_close_matches(name, FIELDS, n=1, cutoff=0.85)
        if name not in FIELDS and not hasattr(args, name) and near:
            raise ArgumentError(
                f"The hyperparameters set '{name}', which is neither a training argument nor a flag of hf_compress. Did you mean "
                f"'{near[0]}'?"
            )
