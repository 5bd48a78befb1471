"""A language model's head, the layer from hidden states to words, called for the tokens that count and no others.

    model(**inputs) -> layers -> hidden (batch, tokens, width) --head--> logits (batch, tokens, vocabulary)
                                    |       ^
                                    |       '-- of the first token alone, where nobody needs the others
                                    '-- taken; `PredictionHead.logits` makes the logits of any of its tokens

The vocabulary is so large (30,000 to 250,000 words) that all tokens' logits are most of what a training step holds in memory.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from hf_compress.errors import LossError
from hf_compress.layers.stack import pretrained_model

# What models do to what their head gives, by the name that their configs have for it.
_SOFTCAP = "final_logit_softcapping"
_FACTORS = ("logit_scale", "lm_head_multiplier")
_DIVISORS = ("logits_scaling",)

# The taps that are on a model now: a second one takes the place of the first, which would leave it one token.
_ATTACHED: WeakKeyDictionary[nn.Module, HeadTap] = WeakKeyDictionary()

OFF = "--distill_logits_chunk_size 0"


class PredictionHead:
    """The head of a language model, with what the model does to its output.

    Args:
        model: a causal or masked language model; a PEFT model is fine.

    Raises:
        LossError: it has no head that can be called by itself.
    """

    def __init__(self, model: nn.Module) -> None:
        owner: Any = pretrained_model(model)
        head = owner.get_output_embeddings()
        if not isinstance(head, nn.Module):
            raise LossError(
                f"The head of a {type(owner).__name__} cannot be called by itself, so its logits cannot be compared in chunks: {OFF}."
            )
        self.module = head
        config: Any = owner.config.get_text_config()
        self._softcap = getattr(config, _SOFTCAP, None)
        self._factor = 1.0
        for name in _FACTORS:
            self._factor *= float(getattr(config, name, None) or 1)
        for name in _DIVISORS:
            self._factor /= float(getattr(config, name, None) or 1)

    @property
    def sharded(self) -> bool:
        """Whether each process holds a part of it: ZeRO-3, `fully_shard`."""
        # Within its own call the weights of an FSDP module are whole.
        wrapped = isinstance(self.module, FSDPModule)
        return wrapped or any(hasattr(each, "ds_id") or isinstance(each, DTensor) for each in self.module.parameters())

    def logits(self, hidden: Tensor) -> Tensor:
        """(..., width) -> (..., vocabulary)."""
        made: Tensor = self.module(hidden)
        return self.finished(made)

    def finished(self, logits: Tensor) -> Tensor:
        """What the model makes of its head's output: scaled, softly capped."""
        if self._factor != 1:
            logits = logits * self._factor
        if self._softcap:
            logits = torch.tanh(logits / self._softcap) * self._softcap
        return logits


class HeadTap:
    """Hooks that take what a model's head reads, in each of its forwards.

    Args:
        model: the plain model; a PEFT model is fine.
        head: its head.
        take: is given the hidden states, (batch, tokens, width), inside the model's forward. None where no loss reads predictions: then
            there is nothing to take, and a head that is not called, or does more than is known here, may.
        skip: whether the model then makes the first token's logits only; else all, as ever.
        only_in_training: True for a student, whose evaluation must stay the task's own.
        wanted: whether the forward that begins is one to take from; by default each is.
    """

    def __init__(
        self,
        model: nn.Module,
        head: PredictionHead,
        take: Callable[[Tensor], None] | None,
        *,
        skip: bool,
        only_in_training: bool,
        wanted: Callable[[], bool] | None = None,
    ) -> None:
        self._wanted = wanted
        self._head, self._take, self._skip, self._only_in_training = head, take, skip, only_in_training
        self._waiting = False  # in a forward, before its head was called
        self._hidden: Tensor | None = None  # between the beginning and the end of its call
        self._checked = False
        self._first: Tensor | None = None
        if model in _ATTACHED:
            _ATTACHED[model].remove()
        self._handles = [
            model.register_forward_pre_hook(self._begin),
            head.module.register_forward_pre_hook(self._enter),
            head.module.register_forward_hook(self._leave),
            model.register_forward_hook(self._finish),
        ]
        _ATTACHED[model] = self

    @classmethod
    def of_unread(cls, model: nn.Module, *, only_in_training: bool, wanted: Callable[[], bool] | None = None) -> HeadTap | None:
        """Have a language model make next to no logits, where no loss reads them; None if its head cannot be told from the rest."""
        try:
            head = PredictionHead(model)
        except LossError:
            return None
        return cls(model, head, None, skip=True, only_in_training=only_in_training, wanted=wanted)

    @property
    def takes(self) -> bool:
        """Whether somebody reads what the head reads."""
        return self._take is not None

    @property
    def attached(self) -> bool:
        """Whether the hooks are still on the model."""
        return bool(self._handles)

    def remove(self) -> None:
        """Take the hooks off."""
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def _begin(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        taken = self._wanted is None or self._wanted()
        self._waiting = taken and (module.training or not self._only_in_training)

    def _enter(self, module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
        if not self._waiting:
            return None
        self._waiting = False
        self._hidden, *rest = args
        if self._take is None and self._hidden.dim() != 3:
            return None  # padding was left out already, or only the tokens with labels are here
        return (self._hidden[:, :1].contiguous(), *rest) if self._skip else None

    def _leave(self, module: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
        if self._hidden is None:
            return
        # `take` may call the head itself. Not before its own call has ended: FSDP would take its weights away under it.
        hidden, self._hidden = self._hidden, None
        if self._take is None:
            return
        self._first = None if self._checked else output[:, :1].detach()
        self._take(hidden)

    def _finish(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        """In the first forward, see that the model does to its logits what is known of it: the only values read from the device."""
        waiting, self._waiting = self._waiting, False
        if waiting and self._take is not None:
            raise LossError(f"{type(module).__name__} did not call its head in its forward: {OFF} compares whole logits.")
        if self._first is None:
            return
        shown, ours = output["logits"][:, :1].detach().float(), self._head.finished(self._first).float()
        self._first, self._checked = None, True
        if shown.shape != ours.shape or not torch.allclose(shown, ours, rtol=1e-2, atol=1e-3):
            raise LossError(
                f"{type(module).__name__} makes its logits in a way of its own (after its head come steps that are not known here), so "
                f"they cannot be compared in chunks. Compare whole logits: {OFF}."
            )
