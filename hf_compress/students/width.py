"""The teacher's config at another depth and width.

Families call the same thing by other names (BERT `hidden_size`, DistilBERT `dim`, T5 `d_model`); which of them a config states is looked
up in the config itself, and what follows from the width (a head's size, key-value heads, ...) is changed along with it.
"""

from __future__ import annotations

from typing import Any

from transformers import PreTrainedConfig

from hf_compress.errors import ArgumentError
from hf_compress.layers.record import CONFIG_KEY
from hf_compress.layers.stack import DEPTH_NAMES

HIDDEN_SIZE_NAMES = ("hidden_size", "d_model", "dim", "n_embd")
HEAD_NAMES = ("num_attention_heads", "n_heads", "n_head", "num_heads", "encoder_attention_heads", "decoder_attention_heads")
INTERMEDIATE_SIZE_NAMES = ("intermediate_size", "hidden_dim", "n_inner", "d_inner", "d_ff", "encoder_ffn_dim", "decoder_ffn_dim")

# Sizes that many configs set to the hidden size, and then have to follow it.
SAME_AS_HIDDEN_SIZE = ("embedding_size", "pooler_hidden_size", "pooler_output_size")
HEAD_SIZE_NAMES = ("head_dim", "d_head", "d_kv", "attention_head_size")
PER_LAYER_NAMES = ("layer_types", "mlp_layer_types")


def with_width(
    config: PreTrainedConfig,
    *,
    num_hidden_layers: int | None = None,
    hidden_size: int | None = None,
    num_attention_heads: int | None = None,
    intermediate_size: int | None = None,
) -> PreTrainedConfig:
    """A copy of the config with another depth, width, number of heads or size of the feed-forward layer.

    Label names, problem type, vocabulary and everything else stay. What is None stays too, but the feed-forward size keeps its ratio to
    the hidden size.

    Raises:
        ArgumentError: a number that is not positive, a width that the heads do not divide, more layers than before, or a config that
            does not say what its width is called.
    """
    values = config.to_dict()
    old_depth = _stated(values, DEPTH_NAMES, config, "depth")
    old_width = _stated(values, HIDDEN_SIZE_NAMES, config, "hidden size")
    old_heads = _stated(values, HEAD_NAMES, config, "number of attention heads")
    depth = old_depth if num_hidden_layers is None else num_hidden_layers
    width = old_width if hidden_size is None else hidden_size
    heads = old_heads if num_attention_heads is None else num_attention_heads
    _check(depth=depth, old_depth=old_depth, width=width, heads=heads, intermediate_size=intermediate_size)

    _put(values, DEPTH_NAMES, depth)
    _put(values, HIDDEN_SIZE_NAMES, width)
    _put(values, HEAD_NAMES, heads)
    for name in INTERMEDIATE_SIZE_NAMES:
        if name in values and intermediate_size is not None:
            values[name] = intermediate_size
        elif isinstance(values.get(name), int):
            values[name] = round(values[name] * width / old_width)
    for name in SAME_AS_HIDDEN_SIZE:
        if values.get(name) == old_width:
            values[name] = width
    for name in HEAD_SIZE_NAMES:
        if isinstance(values.get(name), int) and values[name] * old_heads == old_width:
            values[name] = width // heads
    if isinstance(values.get("num_key_value_heads"), int):
        values["num_key_value_heads"] = _key_value_heads(heads, old_heads // values["num_key_value_heads"])
    for name in PER_LAYER_NAMES:
        if isinstance(values.get(name), list) and len(values[name]) == old_depth:
            values[name] = values[name][:depth]
    values.pop(CONFIG_KEY, None)  # a student of another width has lost no layers: none of them was the teacher's
    changed = type(config).from_dict(values)
    changed._name_or_path = ""  # nothing that lies beside the teacher, as learnt projections, is this student's
    return changed


def _stated(values: dict[str, Any], names: tuple[str, ...], config: PreTrainedConfig, meaning: str) -> int:
    """The number that stands under the first of these names."""
    for name in names:
        if isinstance(values.get(name), int):
            return int(values[name])
    raise ArgumentError(
        f"{type(config).__name__} does not state its {meaning} under a known name ({', '.join(names)}), so no student of another width can "
        "be made from it. Keep layers of the teacher instead."
    )


def _put(values: dict[str, Any], names: tuple[str, ...], number: int) -> None:
    for name in names:
        if isinstance(values.get(name), int):
            values[name] = number


def _check(*, depth: int, old_depth: int, width: int, heads: int, intermediate_size: int | None) -> None:
    for name, number in (
        ("num_hidden_layers", depth),
        ("hidden_size", width),
        ("num_attention_heads", heads),
        ("intermediate_size", intermediate_size),
    ):
        if number is not None and number < 1:
            raise ArgumentError(f"--{name} is {number}; expected at least 1.")
    if depth > old_depth:
        raise ArgumentError(f"--num_hidden_layers is {depth}, but the teacher has only {old_depth} layers.")
    if width % heads:
        fitting = [number for number in range(1, 2 * heads + 1) if width % number == 0]
        near = sorted(sorted(fitting, key=lambda number: abs(number - heads))[:3])
        raise ArgumentError(
            f"--hidden_size {width} cannot be divided among {heads} attention heads; choose --num_attention_heads from "
            f"{', '.join(map(str, near))}, or --hidden_size {width // heads * heads} or {(width // heads + 1) * heads}."
        )


def _key_value_heads(heads: int, group: int) -> int:
    """As many key-value heads as the query heads' groups ask for; fewer where the heads do not divide."""
    return next(number for number in range(max(1, heads // max(1, group)), 0, -1) if heads % number == 0)
