"""The flags of layer dropping and freezing: which layers, and when. `arguments.py` says how flags are kept."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal, cast, get_args

from hf_compress.argument_values import INFINITE, layer_numbers, number_within, one_of
from hf_compress.errors import ArgumentError

LayerDropStrategyName = Literal["top", "bottom", "symmetric", "alternate", "alternate_odd", "contribution"]
StackName = Literal["encoder", "decoder", "both"]

# What a flag holds as text may be a list in a file or in Python. HfArgumentParser takes the first type if None is the second.
Layers = str | None | list[int]

# The flags that say when layers go, if not before training.
TIMED = ("layer_drop_after_epochs", "layer_drop_every_n_epochs")


def _flag(help_text: str) -> dict[str, str]:
    return {"help": help_text}


@dataclass
class LayerDropArguments:
    """Which layers to drop, when, and what not to train."""

    layer_drop_strategy: str | None = field(
        default=None, metadata=_flag(f"Which layers to drop: {', '.join(get_args(LayerDropStrategyName))}.")
    )
    num_layers_to_drop: int | None = field(
        default=None, metadata=_flag("How many layers the strategy drops; by default a third, at least one.")
    )
    layers_to_drop: Layers = field(
        default=None, metadata=_flag("The layers to drop instead of a strategy, counted from 1: 5-8 or 5,6,7,8.")
    )
    layers_to_keep: Layers = field(default=None, metadata=_flag("The layers to keep instead of a strategy, counted from 1: 1-4,9-12."))
    layer_drop_threshold: float | None = field(
        default=None,
        metadata=_flag(
            "With the contribution strategy: drop the layers whose input and output are more alike than this cosine (by default 0.95)."
        ),
    )
    layer_drop_stack: str | None = field(
        default=None, metadata=_flag("Where a model has an encoder and a decoder, which of them loses layers: encoder, decoder, both.")
    )
    layer_drop_after_epochs: int | None = field(
        default=None,
        metadata=_flag("Train with all layers for so many epochs, then drop, then train on; by default layers go before training."),
    )
    layer_drop_every_n_epochs: int | None = field(
        default=None, metadata=_flag("Drop one layer after every so many epochs of training, until all that are to go have gone.")
    )
    freeze_layers_before_drop: bool = field(
        default=False, metadata=_flag("With one of these two: do not train the layers that are to go while they are there.")
    )
    freeze_embeddings: bool = field(default=False, metadata=_flag("Do not train the embeddings."))
    layers_to_freeze: Layers = field(
        default=None, metadata=_flag("Layers not to train, counted from 1 in the full model, before any is dropped: 1-4.")
    )

    @property
    def strategy(self) -> LayerDropStrategyName | None:
        """The strategy, checked."""
        return cast("LayerDropStrategyName | None", self.layer_drop_strategy)

    @property
    def stack(self) -> Literal["encoder", "decoder"] | None:
        """The one stack that loses layers; None where all there are do."""
        return None if self.layer_drop_stack == "both" else cast("Literal['encoder', 'decoder'] | None", self.layer_drop_stack)

    @property
    def kept(self) -> tuple[int, ...] | None:
        """The layers of `--layers_to_keep`, ascending, counted from 1."""
        return None if self.layers_to_keep is None else layer_numbers(self.layers_to_keep, flag="layers_to_keep")

    @property
    def dropped(self) -> tuple[int, ...] | None:
        """The layers of `--layers_to_drop`, ascending, counted from 1."""
        return None if self.layers_to_drop is None else layer_numbers(self.layers_to_drop, flag="layers_to_drop")

    @property
    def frozen(self) -> tuple[int, ...]:
        """The layers of `--layers_to_freeze`, ascending, counted from 1 in the full model."""
        return () if self.layers_to_freeze is None else layer_numbers(self.layers_to_freeze, flag="layers_to_freeze")

    @property
    def wants_layer_drop(self) -> bool:
        """Whether any flag asks for layers to be dropped."""
        return self.layer_drop_strategy is not None or self.layers_to_drop is not None or self.layers_to_keep is not None

    @property
    def wants_freezing(self) -> bool:
        """Whether any flag asks for parameters not to be trained."""
        return self.freeze_embeddings or self.layers_to_freeze is not None

    def check_layer_drop(self) -> None:
        """Turn what a file gave into numbers, and refuse unknown names, numbers out of range and requests that contradict each other."""
        for flag, known in (("layer_drop_strategy", get_args(LayerDropStrategyName)), ("layer_drop_stack", get_args(StackName))):
            if getattr(self, flag) is not None:
                one_of(getattr(self, flag), known, flag=flag)
        for flag in ("num_layers_to_drop", "layer_drop_after_epochs", "layer_drop_every_n_epochs"):
            setattr(self, flag, number_within(getattr(self, flag), 1.0, INFINITE, whole=True, flag=flag))
        self.layer_drop_threshold = number_within(self.layer_drop_threshold, 0.0, 1.0, flag="layer_drop_threshold")
        given = [f"--{name}" for name in ("layer_drop_strategy", "layers_to_drop", "layers_to_keep") if getattr(self, name) is not None]
        if len(given) > 1:
            raise ArgumentError(f"{' and '.join(given)} contradict each other; give one of them.")
        if self.num_layers_to_drop is not None and self.layer_drop_threshold is not None:
            raise ArgumentError("--num_layers_to_drop and --layer_drop_threshold contradict each other; give one of them.")
        if self.num_layers_to_drop is not None and self.layer_drop_strategy is None:
            reason = f"{given[0]} says already which layers go" if given else "no --layer_drop_strategy says which layers go"
            raise ArgumentError(f"--num_layers_to_drop {self.num_layers_to_drop}, but {reason}.")
        if self.layer_drop_threshold is not None and self.layer_drop_strategy != "contribution":
            raise ArgumentError("--layer_drop_threshold belongs to --layer_drop_strategy contribution; add that or leave it out.")
        timed = [f"--{name}" for name in TIMED if getattr(self, name) is not None]
        if len(timed) > 1:
            raise ArgumentError(f"{' and '.join(timed)} contradict each other (all layers at once, one after another); give one of them.")
        if self.freeze_layers_before_drop and not timed:
            raise ArgumentError("--freeze_layers_before_drop, but layers go before training: add --layer_drop_after_epochs.")
        if timed and not given:
            raise ArgumentError(f"{timed[0]}, but no layers are dropped; add --layer_drop_strategy, --layers_to_drop or --layers_to_keep.")
        if self.layer_drop_stack is not None and not given:
            raise ArgumentError(
                f"--layer_drop_stack {self.layer_drop_stack}, but no layers are dropped; add --layer_drop_strategy, "
                "--layers_to_drop or --layers_to_keep."
            )
