"""What a model shows, taken inside its own forward.

    model(**inputs)
      |- before layer 1        embedding output       hidden state 0
      |- after layer i         raw output             hidden state i     (through its projection, if it has one)
      |- inside layer i        QK^T/sqrt(d)           attention scores i     (T5: and its bias of relative positions)
      |                        Q, K, V                attention vectors i
      '- at the end            the output becomes a plain dict that holds all of these

Everything a loss uses must come out of the student's own forward: what is computed beside it is unknown to DDP ("Expected to mark a
variable ready only once"), to FSDP and to ZeRO. A plain dict, since DDP rebuilds a ModelOutput with its own fields only. In
evaluation the hooks do nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import Any
from weakref import WeakKeyDictionary

from torch import Tensor, nn

from hf_compress.attention import Listener, Listening, attention_scores
from hf_compress.errors import LossError
from hf_compress.layers.stack import LayerStack, find_stacks, pretrained_model
from hf_compress.selected_state import at_positions
from hf_compress.signals import VECTOR_KINDS, AttentionScores, AttentionVectors, Signals, SignalSpec, logits_of

# The hooks that are on a model now: a second trainer on the same model takes the place of the first.
_ATTACHED: WeakKeyDictionary[nn.Module, Capture] = WeakKeyDictionary()

# Applies the projection of that name to a hidden state.
Project = Callable[[str, Tensor], Tensor]


class Capture:
    """Hooks on one model that add what a `SignalSpec` asks for to the model's output.

    Args:
        model: the plain model, not its DDP or engine wrapper; a PEFT model is fine.
        spec: what to record; only these layers are touched. Logits are in the output anyway.
        project: applies a projection by name; needed where `spec` names one.
        only_in_training: True for a student, whose evaluation must stay the task's own; False for a teacher.
    """

    def __init__(self, model: nn.Module, spec: SignalSpec, *, project: Project | None = None, only_in_training: bool = True) -> None:
        self.spec = spec
        # A set has another order in each process, and under ZeRO-3 all processes must gather the same projection at the same time.
        self._in_order = sorted(spec.hidden_states, key=lambda key: key.name)
        self._project = project
        self._only_in_training = only_in_training
        self.paused = False  # whoever shares a model with another capture hears nothing in the other's forwards
        self._recorded: dict[str, Tensor] | None = None  # a dict while the model's forward runs
        self._calls: dict[str, int] = {}  # stack -> layers entered in this forward
        self._inside: tuple[str, int] | None = None
        # (teacher, stack, its layer) -> (batch, selected): at which tokens a student's state is taken; set before each forward.
        self.positions: Mapping[tuple[int | None, str, int], Tensor] = {}
        self._listening: list[Listening] = []
        if model in _ATTACHED:
            _ATTACHED[model].remove()
        stacks = find_stacks(model)
        missing = spec.stacks - stacks.keys()
        if missing:
            raise LossError(f"{type(model).__name__} has no stack {', '.join(sorted(missing))}; it has {', '.join(stacks)}.")
        self._handles = [
            model.register_forward_pre_hook(self._begin),
            # Before FSDP's own, which looks at the output for what the backward pass begins with.
            model.register_forward_hook(self._finish, prepend=True),
        ]
        for stack in stacks.values():
            if stack.name in spec.stacks:
                self._hook(model, stack)
        if heard := self._heard(stacks):
            self._listening.append(Listening(pretrained_model(model), heard))
        _ATTACHED[model] = self

    @property
    def attached(self) -> bool:
        """Whether the hooks are still on the model."""
        return bool(self._handles)

    def remove(self) -> None:
        """Take the hooks off the model."""
        for handle in self._handles:
            handle.remove()
        for listening in self._listening:
            listening.stop()
        self._handles, self._listening = [], []

    def signals(self, outputs: Mapping[str, Any]) -> Signals:
        """Read what was asked for back from the model's output."""
        return Signals(
            logits=logits_of(outputs) if self.spec.logits else {},
            hidden_states={key: outputs[key.name] for key in self.spec.hidden_states},
            attention_scores={key: outputs[key.name] for key in self.spec.attention_scores},
            attention_vectors={key: outputs[key.name] for key in self.spec.attention_vectors},
        )

    def _hook(self, model: nn.Module, stack: LayerStack) -> None:
        outside = [key.layer for key in self.spec.keys if key.stack == stack.name and key.layer > stack.depth]
        if outside:
            raise LossError(f"Layer {max(outside)} was asked for, but {type(model).__name__} has {stack.depth} layers.")
        for module in dict.fromkeys(stack.modules):  # ALBERT's one group stands for every layer
            self._handles.append(module.register_forward_pre_hook(self._enter(stack), with_kwargs=True))
            self._handles.append(module.register_forward_hook(self._leave(stack)))

    def _heard(self, stacks: Mapping[str, LayerStack]) -> dict[nn.Module, Listener]:
        """Every part of the layers whose attention is asked for; which part computes it shows when it runs."""

        def parts(keys: Iterable[AttentionScores | AttentionVectors]) -> dict[nn.Module, None]:
            layers = [stacks[name].module(layer) for name, layer in {(key.stack, key.layer) for key in keys}]
            return {part: None for module in layers for part in module.modules()}

        scored = parts(self.spec.attention_scores)
        return {part: partial(self._hear, part in scored) for part in scored | parts(self.spec.attention_vectors)}

    # --- the hooks, in the order in which a forward meets them ---

    def _begin(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        if not self.paused and (module.training or not self._only_in_training):
            self._recorded, self._calls, self._inside = {}, {}, None

    def _enter(self, stack: LayerStack) -> Callable[..., None]:
        def enter(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            if self._recorded is None:
                return
            layer = self._calls.get(stack.name, 0) + 1
            self._calls[stack.name], self._inside = layer, (stack.name, layer)
            if layer == 1:
                values = (*args, *kwargs.values())
                entering = next(v for v in values if isinstance(v, Tensor) and v.is_floating_point() and v.dim() == 3)
                self._record_state(stack, 0, entering)

        return enter

    def _hear(
        self,
        scored: bool,
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        scaling: float | None,
        position_bias: Tensor | None,
    ) -> None:
        if self.paused or (self._recorded is None and not module.training):
            return  # evaluation, or another's forward
        # Computed in the second pass of gradient checkpointing too, which must save the same tensors as the first.
        scores = attention_scores(query, key, scaling, position_bias) if scored else None
        if self._recorded is None or self._inside is None:
            return
        # The first attention in a layer is its self-attention; a decoder's cross-attention comes after it.
        if scores is not None and (heard := AttentionScores(*self._inside)) in self.spec.attention_scores:
            self._recorded.setdefault(heard.name, scores)
        for kind, vectors in zip(VECTOR_KINDS, (query, key, value), strict=True):
            if (vector := AttentionVectors(*self._inside, kind)) in self.spec.attention_vectors:
                self._recorded.setdefault(vector.name, vectors)

    def _leave(self, stack: LayerStack) -> Callable[..., None]:
        def leave(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            if self._recorded is not None:
                self._record_state(stack, self._calls[stack.name], output[0] if isinstance(output, tuple) else output)
                self._inside = None

        return leave

    def _record_state(self, stack: LayerStack, layer: int, state: Tensor) -> None:
        assert self._recorded is not None
        wanted = [key for key in self._in_order if (key.stack, key.layer) == (stack.name, layer)]
        state = state.transpose(0, 1) if wanted and stack.time_major else state
        for key in wanted:
            # Taken before the projection, which then has as little to do as there are selected tokens.
            taken = state if key.taught_by is None else at_positions(state, self.positions[key.teacher, stack.name, key.taught_by])
            if not key.projection:
                self._recorded[key.name] = taken
            else:
                assert self._project is not None
                self._recorded[key.name] = self._project(key.projection, taken)

    def _finish(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        if self._recorded is None:
            return None
        recorded, self._recorded = self._recorded, None  # a second pass in backward (gradient checkpointing) is not heard
        absent = {key.name for key in self.spec.keys} - recorded.keys()
        if absent:
            raise LossError(
                f"{type(module).__name__} did not show {', '.join(sorted(absent))} in its forward. "
                "If it computes attention in a way of its own, use losses without attention."
            )
        if not isinstance(output, Mapping):
            raise LossError(f"{type(module).__name__} returned a {type(output).__name__}; distilling needs return_dict=True.")
        return {**output, **recorded}
