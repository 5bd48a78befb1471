"""How signals are named on disk: a field a signal, a column a part of it, a group where rows are counted alike.

hidden_states.layers.9.values          the numbers                    rows: tokens, or selected tokens
hidden_states.layers.9.scales          int8: one a row
hidden_states.layers.9.positions       which tokens were selected     (from 0, in the unpadded example)
hidden_states.layers.9.mask            magnitude: which dimensions each selected token keeps, packed
hidden_states.layers.9.importance      how much the summary token attends to each token: what a smaller selection is chosen by
attention_scores.layers.9.values       rows: heads x queries x keys
logits.values                          rows: one a record, or tokens
special.layers                         1 where a token is special ([SEP], ...), but for the one that sums the example up
"""

from __future__ import annotations

from hf_compress.errors import CacheError
from hf_compress.signals import LOGITS, AttentionScores, HiddenState, SignalSpec


def field_of(signal: HiddenState | AttentionScores) -> str:
    """`hidden_states.layers.9`, `attention_scores.layers.9`."""
    kind = "hidden_states" if isinstance(signal, HiddenState) else "attention_scores"
    return f"{kind}.{signal.stack}.{signal.layer}"


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
    logits = False
    for column in columns:
        field, _, part = column.rpartition(".")
        kind, _, rest = field.partition(".")
        stack, _, layer = rest.rpartition(".")
        if kind == "hidden_states" and layer.isdigit():
            states.add(HiddenState(stack, int(layer)))
        elif kind == "attention_scores" and layer.isdigit():
            scores.add(AttentionScores(stack, int(layer)))
        elif field in LOGITS and part == "values":
            logits = True
        elif kind != "special":
            raise CacheError(f"The cache holds a column {column!r}, which is no signal that is known here.")
    return SignalSpec(logits, frozenset(states), frozenset(scores))
