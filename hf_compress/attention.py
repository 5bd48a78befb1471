"""Attention scores, queries, keys and values, with the fast attention left on.

transformers looks its attention functions up by name. Under a name of our own we register a function that first hands q, k and v to whoever
listens to that module, then calls the fast one (sdpa or flash). Queries and keys arrive after rotation and norms, so they are those that
the layer really uses; the layer's output does not change by a bit. While nobody listens, the call is the fast function's alone.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any
from weakref import WeakKeyDictionary

from torch import Tensor, nn
from transformers import AttentionInterface, PreTrainedModel
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, AttentionMaskInterface
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from hf_compress.errors import LossError

# Whoever listens to an attention module gets it, its queries, keys and values, its scaling and what it adds for positions, and decides what
# to compute of them.
Listener = Callable[[nn.Module, Tensor, Tensor, Tensor, float | None, Tensor | None], None]
# A student that is its own teacher, its adapters switched off, has two captures, and so two listeners.
_LISTENERS: WeakKeyDictionary[nn.Module, tuple[Listener, ...]] = WeakKeyDictionary()
# What a model's attention was called before anybody listened.
_BEFORE: WeakKeyDictionary[nn.Module, str | None] = WeakKeyDictionary()
_PREFIX = "scores_and_"


def attention_scores(query: Tensor, key: Tensor, scaling: float | None, position_bias: Tensor | None = None) -> Tensor:
    """QK^T * scaling, and T5's bias of relative positions, before mask and softmax.

    Args:
        query: (batch, heads, queries, head width).
        key: (batch, key heads, keys, head width); fewer key heads than heads are repeated (grouped-query attention).
        scaling: 1/sqrt(head width) where None.
        position_bias: (1 or batch, heads, queries, keys), what is added for where the keys stand; None for nothing.

    Returns:
        (batch, heads, queries, keys).
    """
    groups = query.shape[1] // key.shape[1]
    if groups > 1:
        key = key.repeat_interleave(groups, dim=1)
    scores = (query * (1 / math.sqrt(query.shape[-1]) if scaling is None else scaling)) @ key.transpose(-1, -2)
    return scores if position_bias is None else scores + position_bias


def _recording(fast: Callable[..., Any]) -> Callable[..., Any]:
    def forward(
        module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, *args: Any, **kwargs: Any
    ) -> Any:
        for listener in _LISTENERS.get(module, ()):
            listener(module, query, key, value, kwargs.get("scaling"), kwargs.get("position_bias"))
        return fast(module, query, key, value, attention_mask, *args, **kwargs)

    return forward


def shows_scores(model: PreTrainedModel) -> bool:
    """Whether the model takes its attention function from transformers' registry (XLNet, DeBERTa and MPNet do not)."""
    current = (model.config._attn_implementation or "eager").removeprefix(_PREFIX)
    fast = "sdpa" if current == "eager" else current
    return bool(model._supports_sdpa) and model._can_set_attn_implementation() and fast in ALL_ATTENTION_FUNCTIONS


class Listening:
    """While it lasts, each listener hears its attention module in every forward.

    Args:
        model: its attention implementation is replaced by the same one with listening; its outputs stay equal to the bit.
        modules: the attention modules, each with its listener.

    Raises:
        LossError: where the model's scores cannot be heard; see `shows_scores`.
    """

    def __init__(self, model: PreTrainedModel, modules: Mapping[nn.Module, Listener]) -> None:
        if not shows_scores(model):
            raise LossError(
                f"{type(model).__name__} does not take its attention function from transformers' registry, so its attention scores "
                "cannot be seen. Use losses without attention: the recipe distilbert, pkd or logits, or leave AttentionScoresLoss out."
            )
        current = model.config._attn_implementation
        # eager functions live in each model's own file; sdpa computes the same thing.
        fast = "sdpa" if current in (None, "eager") else current.removeprefix(_PREFIX)
        name = _PREFIX + fast
        if name not in ALL_ATTENTION_FUNCTIONS:
            AttentionInterface.register(name, _recording(ALL_ATTENTION_FUNCTIONS[fast]))
            AttentionMaskInterface.register(name, ALL_MASK_ATTENTION_FUNCTIONS[fast])
        configs = {id(config): config for config in (getattr(module, "config", None) for module in model.modules())}
        self._configs: list[Any] = [config for config in configs.values() if getattr(config, "_attn_implementation", None) == current]
        self._model = model
        _BEFORE.setdefault(model, current)
        for config in self._configs:
            config._attn_implementation = name
        self._modules = dict(modules)
        for module, listener in modules.items():
            _LISTENERS[module] = (*_LISTENERS.get(module, ()), listener)

    def stop(self) -> None:
        """Forget the listeners, and give the model its own attention implementation back, unless others listen to it."""
        for module, listener in self._modules.items():
            others = tuple(each for each in _LISTENERS.pop(module, ()) if each is not listener)
            if others:
                _LISTENERS[module] = others
        if self._modules and not any(module in _LISTENERS for module in self._model.modules()):
            before = _BEFORE.pop(self._model, None)
            for config in self._configs:
                config._attn_implementation = before
        self._modules, self._configs = {}, []
