"""What somebody asks to be dropped, checked as far as it can be without a model."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from hf_compress.errors import LayerDropError
from hf_compress.layers.record import KeptLayers
from hf_compress.layers.strategies import (
    LayerDropStrategy,
    check_layer_numbers,
    check_strategy,
    layers_to_drop,
)

DEFAULT_THRESHOLD = 0.95
"""Contribution drops what is more alike than this if neither a number nor a threshold is given (arXiv 2004.03844, section 4)."""


def named_layers(layers: Any, name: str) -> tuple[Any, ...] | None:
    """Layers that were given by number, as a tuple; None stays None. Raises LayerDropError if that is no list of numbers."""
    if layers is None:
        return None
    if isinstance(layers, (str, int)) or not isinstance(layers, Iterable):
        raise LayerDropError(f"{name} is {layers!r}, but in Python it is a list of numbers, such as {name}=[5, 6] or {name}=range(5, 9).")
    return tuple(layers)


@dataclass(frozen=True)
class DropRequest:
    """Which layers are to go: by strategy, by number, or by naming those that stay.

    `stack` is "encoder" or "decoder" to touch only that one; None is both. When they go: at once, before training, where neither
    `after_epochs` nor `every_n_epochs` is given (see `layers.schedule`). Raises LayerDropError where the parts contradict each other.
    """

    strategy: LayerDropStrategy | None = None
    num_layers_to_drop: int | None = None
    layers_to_drop: tuple[int, ...] | None = None
    layers_to_keep: tuple[int, ...] | None = None
    threshold: float | None = None
    stack: str | None = None
    after_epochs: int | None = None
    every_n_epochs: int | None = None
    freeze_before_drop: bool | None = None

    @classmethod
    def of(
        cls,
        strategy: str | None = None,
        *,
        num_layers_to_drop: int | None = None,
        layers_to_drop: Sequence[int] | None = None,
        layers_to_keep: Sequence[int] | None = None,
        threshold: float | None = None,
        stack: str | None = None,
        after_epochs: int | None = None,
        every_n_epochs: int | None = None,
        freeze_before_drop: bool = False,
    ) -> DropRequest:
        """The request, from arguments as people give them."""
        return cls(
            strategy=None if strategy is None else check_strategy(strategy),
            num_layers_to_drop=num_layers_to_drop,
            layers_to_drop=named_layers(layers_to_drop, "layers_to_drop"),
            layers_to_keep=named_layers(layers_to_keep, "layers_to_keep"),
            threshold=threshold,
            stack=None if stack == "both" else stack,
            after_epochs=after_epochs,
            every_n_epochs=every_n_epochs,
            freeze_before_drop=freeze_before_drop or None,
        )

    def __post_init__(self) -> None:
        ways = {"strategy": self.strategy, "layers_to_drop": self.layers_to_drop, "layers_to_keep": self.layers_to_keep}
        given = [name for name, value in ways.items() if value is not None]
        if not given:
            also = [name for name in ("num_layers_to_drop", "threshold") if getattr(self, name) is not None]
            raise LayerDropError(
                f"Nothing says which layers to drop{' (only ' + ' and '.join(also) + ' is given)' if also else ''}: "
                "give a strategy such as "
                f"{'contribution' if self.threshold is not None else 'top'!r}, or layers_to_drop, or layers_to_keep."
            )
        if len(given) > 1:
            raise LayerDropError(f"{' and '.join(given)} are given together, but each alone says which layers to drop: leave one.")
        if self.num_layers_to_drop is not None:
            self._check_number()
        if self.threshold is not None:
            self._check_threshold()
        self._check_schedule()

    @property
    def is_gradual(self) -> bool:
        """Whether layers go while the model is trained, and not before."""
        return self.after_epochs is not None or self.every_n_epochs is not None

    def _check_schedule(self) -> None:
        for name in ("after_epochs", "every_n_epochs"):
            epochs = getattr(self, name)
            if epochs is not None and (isinstance(epochs, bool) or not isinstance(epochs, int) or epochs < 1):
                raise LayerDropError(f"{name} is {epochs!r}, but layers go between two epochs: give a whole number of at least 1.")
        if self.after_epochs is not None and self.every_n_epochs is not None:
            raise LayerDropError(
                f"after_epochs ({self.after_epochs}: all layers go at once) and every_n_epochs ({self.every_n_epochs}: one after another) "
                "are given together: leave one."
            )
        if self.freeze_before_drop and not self.is_gradual:
            raise LayerDropError(
                "freeze_before_drop keeps the layers that are to go from being trained until they go, but they go before training: say "
                "when, with after_epochs or every_n_epochs."
            )

    def _check_number(self) -> None:
        number = self.num_layers_to_drop
        if self.strategy is None:
            raise LayerDropError(f"num_layers_to_drop is {number}, but the layers are named one by one: leave one of the two.")
        if isinstance(number, bool) or not isinstance(number, int) or number < 1:
            raise LayerDropError(
                f"num_layers_to_drop is {number!r}, but it has to be a whole number of at least 1. To drop no layers, "
                "leave out the strategy."
            )
        if self.threshold is not None:
            raise LayerDropError(
                f"num_layers_to_drop ({number}) and threshold ({self.threshold}) are given together, but each alone "
                "says how many layers go: leave one."
            )

    def _check_threshold(self) -> None:
        if self.strategy != "contribution":
            raise LayerDropError(
                f"threshold is {self.threshold}, but only the strategy 'contribution' has one: the strategy is {self.strategy!r}."
            )
        if not isinstance(self.threshold, (int, float)) or not 0 < self.threshold < 1:
            raise LayerDropError(
                f"threshold is {self.threshold!r}, but it is a cosine similarity between 0 and 1, such as {DEFAULT_THRESHOLD}."
            )

    @property
    def effective_threshold(self) -> float | None:
        """The threshold of a contribution request: the one given, 0.95 without any, None if a number of layers is given."""
        if self.strategy != "contribution" or self.num_layers_to_drop is not None:
            return None
        return DEFAULT_THRESHOLD if self.threshold is None else self.threshold

    def resolve(self, num_layers: int) -> tuple[int, ...]:
        """The layers to drop of `num_layers`, ascending, for all but contribution. Raises LayerDropError."""
        if self.strategy is not None:
            return layers_to_drop(self.strategy, num_layers, self.num_layers_to_drop)
        if self.layers_to_keep is not None:
            keep = check_layer_numbers(self.layers_to_keep, num_layers, "layers_to_keep")
            if len(keep) == num_layers:
                raise LayerDropError(
                    f"layers_to_keep names all {num_layers} layers, so that none would be dropped. Leave it out to drop none."
                )
            return tuple(layer for layer in range(1, num_layers + 1) if layer not in keep)
        assert self.layers_to_drop is not None
        drop = check_layer_numbers(self.layers_to_drop, num_layers, "layers_to_drop")
        if len(drop) == num_layers:
            raise LayerDropError(f"layers_to_drop names all {num_layers} layers, but at least 1 has to stay.")
        return drop

    def matches(self, recorded: KeptLayers) -> bool:
        """Whether this request, on the full model, is the one that `recorded` came from, or names the same layers."""
        if self.strategy == "contribution":
            asked = dict(recorded.request)
            if recorded.to_drop:
                return False
            if asked.get("strategy") != "contribution":
                return False
            other = DropRequest("contribution", num_layers_to_drop=asked.get("num_layers_to_drop"), threshold=asked.get("threshold"))
            return (self.num_layers_to_drop, self.effective_threshold) == (other.num_layers_to_drop, other.effective_threshold)
        try:
            return self.resolve(recorded.num_layers) == recorded.dropped
        except LayerDropError:
            return False

    def written(self) -> tuple[tuple[str, Any], ...]:
        """What was given, for the record in the config: sorted names and values."""
        return tuple(sorted((name, value) for name, value in vars(self).items() if value is not None))

    def __str__(self) -> str:
        return ", ".join(f"{name}={list(value) if isinstance(value, tuple) else value}" for name, value in self.written())
