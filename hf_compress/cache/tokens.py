"""Length: which tokens of an example are kept, layer by layer (MUD, arXiv 2106.05691).

Other than the paper's released code: padding is never chosen, special tokens are told by a mask and not by the id 102, and an example
with too few tokens keeps fewer.
"""

from __future__ import annotations

import torch
from torch import Tensor

from hf_compress.cache.selection import LengthScheme, RankBy
from hf_compress.errors import ArgumentError, CacheError


def token_importance(attention_scores: Tensor, mask: Tensor, summary_index: Tensor, rank_by: RankBy) -> Tensor:
    """How much the summary token attends to each token, mean over heads.

    Args:
        attention_scores: (batch, heads, tokens, tokens), before mask and softmax.
        mask: (batch, tokens) bool, True where a token is real.
        summary_index: (batch,) int64, where the summary token stands.
        rank_by: "probabilities", after a softmax over the real tokens; or "scores" as they are, as in the paper's released code.

    Returns:
        (batch, tokens) float32; 0 at padding.
    """
    rows = torch.arange(len(mask), device=mask.device)
    attention = attention_scores[rows, :, summary_index].float()  # (batch, heads, tokens)
    real = mask.bool()[:, None]
    if rank_by == "probabilities":
        attention = attention.masked_fill(~real, float("-inf")).softmax(-1)
    return attention.masked_fill(~real, 0.0).mean(1)  # replaced, not multiplied: a row without a real token is NaN by now


def choose_tokens(
    scheme: LengthScheme,
    k: int | None,
    mask: Tensor,
    special: Tensor | None = None,
    importance: Tensor | None = None,
    summary_index: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Choose up to `k` real tokens of each example. Of equally important tokens the one further left is chosen.

    Args:
        scheme: see `Selection.length`.
        k: how many; None with "all".
        mask: (batch, tokens) bool, True where a token is real; padding may be on either side.
        special: (batch, tokens) bool, True at special tokens, by the tokenizer's mask; "attention_no_sep" needs it.
        importance: (batch, tokens), see `token_importance`; "attention" and "attention_no_sep" need it.
        summary_index: (batch,) int64, where the summary token stands, which "attention_no_sep" lets compete though it is special; None
            for the first real token.

    Returns:
        positions: (batch, min(k, tokens)) int64, the most important first under the attention schemes, else ascending; so the first of
            them are what a smaller `k` chooses. 0 where an example has no more tokens.
        chosen: (batch, min(k, tokens)) bool, True where a position counts.

    Raises:
        ArgumentError: no number of tokens, or one below 1.
        CacheError: what the scheme needs is not there, or the importance of a token is NaN.
    """
    if (k is None) != (scheme == "all") or (k is not None and k < 1):
        raise ArgumentError(f"The length scheme {scheme!r} got the number of tokens {k}: give one from 1 up, or None with 'all'.")
    eligible = mask.bool()
    ranked = scheme in ("attention", "attention_no_sep")
    if ranked and importance is None:
        raise CacheError(f"The length scheme {scheme!r} ranks tokens by the teacher's attention, and there is none to rank by.")
    if scheme == "attention_no_sep":
        if special is None:
            raise CacheError("The length scheme 'attention_no_sep' leaves special tokens out, and nothing says which tokens are special.")
        summary = eligible.int().argmax(-1) if summary_index is None else summary_index
        is_summary = torch.arange(eligible.shape[1], device=eligible.device) == summary[:, None]
        eligible = eligible & (~special.bool() | is_summary)
    order = torch.arange(eligible.shape[1], device=eligible.device).expand(eligible.shape)
    if ranked and importance is not None:
        _refuse_nan(importance, eligible)
        order = importance.float().argsort(dim=-1, descending=True, stable=True)
    # Second key first, then the first one, both stable: what may be chosen before what may not, whatever its importance.
    order = order.gather(1, (~eligible).gather(1, order).byte().argsort(dim=-1, stable=True))
    width = eligible.shape[1] if k is None else min(k, eligible.shape[1])
    chosen = torch.arange(width, device=eligible.device) < eligible.sum(-1, keepdim=True)  # (batch, width)
    return order[:, :width].masked_fill(~chosen, 0), chosen


def _refuse_nan(importance: Tensor, eligible: Tensor) -> None:
    bad = importance.isnan() & eligible
    if bad.any():
        first = int(bad.any(-1).int().argmax())
        raise CacheError(
            f"The teacher's attention to {int(bad.sum())} tokens is NaN, first in row {first} of the batch, so tokens cannot be ranked by "
            "it. Load the teacher in float32 (--teacher_dtype float32), or choose tokens by left_first."
        )
