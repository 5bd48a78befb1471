"""How signals are named on disk: a field a signal, a column a part of it, a group where rows are counted alike.

hidden_states.layers.9.values          the numbers                    rows: tokens, or selected tokens
hidden_states.layers.9.scales          int8: one a row
hidden_states.layers.9.positions       which tokens were selected     (from 0, in the unpadded example)
hidden_states.layers.9.mask            magnitude: which dimensions each selected token keeps, packed
hidden_states.layers.9.importance      how much the summary token attends to each token: what a smaller selection is chosen by
attention_scores.layers.9.values       rows: heads x queries x keys
attention_vectors.layers.9.keys.values rows: tokens; each row (heads, head width). Of queries, keys or values
logits.values                          rows: one a record, or tokens; see `predictions` for a language model's largest logits
special.layers                         1 where a token is special ([SEP], ...), but for the one that sums the example up
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from hf_compress.cache.predictions import HIGH_IDS, IDS, REST, SCALES, temperatures_of
from hf_compress.errors import CacheError
from hf_compress.signals import LOGITS, VECTOR_KINDS, AttentionScores, AttentionVectors, HiddenState, Signal, SignalSpec, VectorKind


def field_of(signal: Signal) -> str:
    """`hidden_states.layers.9`, `attention_scores.layers.9`, `attention_vectors.layers.9.keys`."""
    return f"hidden_states.{signal.stack}.{signal.layer}" if isinstance(signal, HiddenState) else signal.name


def tokens_group(stack: str) -> str:
    """One row a real token."""
    return f"tokens.{stack}"


def selected_group(stack: str) -> str:
    """One row a selected token: equally many in every layer of a stack."""
    return f"selected.{stack}"


def kept_group(stack: str) -> str:
    """One row a number that magnitude keeps: equally many in every layer of a stack."""
    return f"kept.{stack}"


def queries_group(stack: str) -> str:
    """One row a head and query."""
    return f"queries.{stack}"


def scores_group(stack: str) -> str:
    """One row a head, query and key."""
    return f"scores.{stack}"


def stored_signals(columns: list[str]) -> SignalSpec:
    """What a cache with these columns can show.

    Raises:
        CacheError: for a column of no known signal.
    """
    states: set[HiddenState] = set()
    scores: set[AttentionScores] = set()
    vectors: set[AttentionVectors] = set()
    logits = False
    for column in columns:
        field, _, part = column.rpartition(".")
        kind, _, rest = field.partition(".")
        stack, _, layer = rest.rpartition(".")
        if kind == "hidden_states" and layer.isdigit():
            states.add(HiddenState(stack, int(layer)))
        elif kind == "attention_scores" and layer.isdigit():
            scores.add(AttentionScores(stack, int(layer)))
        elif (key := _vectors_of(field)) is not None:
            vectors.add(key)
        elif field in LOGITS and part == "values":
            logits = True
        elif column in (SCALES, IDS, HIGH_IDS) or column.startswith(REST):
            continue
        elif kind != "special":
            raise CacheError(f"The cache holds a column {column!r}, which is no signal that is known here.")
    return SignalSpec(logits, frozenset(states), frozenset(scores), frozenset(vectors), frozenset(temperatures_of(columns)))


def vector_shapes(items: Mapping[str, tuple[int, ...]]) -> dict[str, dict[VectorKind, tuple[int, int]]]:
    """By stack and kind, number and width of the heads whose vectors are stored.

    Args:
        items: by column, the shape of one row.
    """
    found: dict[str, dict[VectorKind, tuple[int, int]]] = {}
    for column, item in items.items():
        field, _, part = column.rpartition(".")
        if part == "values" and (key := _vectors_of(field)) is not None:
            found.setdefault(key.stack, {})[key.kind] = (item[0], item[1])
    return found


def vector_words(fields: Iterable[str]) -> list[str]:
    """`attention_vectors.layers.9.keys`, ... -> "keys of layer 9": a line for each kind that there is."""
    found = sorted(key for key in map(_vectors_of, fields) if key is not None)
    named = []
    for kind in VECTOR_KINDS:
        layers = [f"{key.layer}" if key.stack == "layers" else f"{key.stack}.{key.layer}" for key in found if key.kind == kind]
        named += [f"{kind} of layer {', '.join(layers)}"] if layers else []
    return named


def _vectors_of(field: str) -> AttentionVectors | None:
    """`attention_vectors.layers.9.keys`, read; None for any other field."""
    signal, _, rest = field.partition(".")
    place, _, word = rest.rpartition(".")
    stack, _, layer = place.rpartition(".")
    kind = next((kind for kind in VECTOR_KINDS if kind == word), None)
    if signal != "attention_vectors" or kind is None or not layer.isdigit():
        return None
    return AttentionVectors(stack, int(layer), kind)
