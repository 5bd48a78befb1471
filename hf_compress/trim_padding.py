"""Cut a batch to its longest example.

Scripts like run_glue.py pad every example to 128 tokens when they tokenize; an MRPC batch of 16 needs about 75. Columns of padding that no
example of the batch needs are cut off, in the collator, so in the DataLoader's workers. Losses and gradients stay what they were.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from hf_compress.task import TOKEN_KINDS, kind_of

# Tensors with one entry a token, by the names transformers gives them.
SEQUENCE_KEYS = frozenset(
    {
        "input_ids",
        "attention_mask",
        "token_type_ids",
        "position_ids",
        "special_tokens_mask",
        "bbox",
        "global_attention_mask",
        "p_mask",
        "shift_labels",
    }
)


def trim_padding(batch: Mapping[str, Any], *, pad_to_multiple_of: int | None = None, labels_are_sequences: bool = False) -> dict[str, Any]:
    """Cut the columns on the right in which no example has a real token.

    Args:
        batch: as a collator gives it; `attention_mask` is (batch, tokens) or (batch, choices, tokens). Without one nothing is cut.
        pad_to_multiple_of: keep the length a multiple of this, as tensor cores like it.
        labels_are_sequences: labels have one entry a token (token classification, language models), and are cut with the rest.

    Returns:
        The same entries, some of them cut. Positions (question answering) count from the left and stay right.
    """
    mask = batch.get("attention_mask")
    if not isinstance(mask, Tensor) or mask.dim() not in (2, 3) or mask.shape[-1] == 0:
        return dict(batch)
    width = mask.shape[-1]
    used = mask.reshape(-1, width).any(0).nonzero()
    length = int(used[-1]) + 1 if len(used) else 1
    if pad_to_multiple_of:
        length = min(width, -(-length // pad_to_multiple_of) * pad_to_multiple_of)
    if length == width:
        return dict(batch)
    keys = SEQUENCE_KEYS | {"labels"} if labels_are_sequences else SEQUENCE_KEYS
    trimmed = dict(batch)
    axis = mask.dim() - 1
    for name in keys & batch.keys():
        value = batch[name]
        if isinstance(value, Tensor) and value.dim() > axis and value.shape[axis] == width:
            trimmed[name] = value.narrow(axis, 0, length).contiguous()  # models call view() on labels
    return trimmed


@dataclass
class TrimPaddingCollator:
    """A collator that trims what another one made.

    Args:
        collator: makes the batch.
        labels_are_sequences: see `trim_padding`.
        pad_to_multiple_of: where the inner collator has none of its own.
    """

    collator: Callable[[list[Any]], Mapping[str, Any]]
    labels_are_sequences: bool = False
    pad_to_multiple_of: int | None = None

    def __call__(self, examples: list[Any]) -> dict[str, Any]:
        """Collate, then trim; a `pad_to_multiple_of` of the inner collator is kept to."""
        batch = self.collator(examples)
        multiple = getattr(self.collator, "pad_to_multiple_of", None) or self.pad_to_multiple_of
        return trim_padding(batch, pad_to_multiple_of=multiple, labels_are_sequences=self.labels_are_sequences)


def trimming(collator: Callable[[list[Any]], Mapping[str, Any]], model: nn.Module, args: Any) -> TrimPaddingCollator:
    """The collator of a run, with its batches cut; in half precision on a GPU to a multiple of 8.

    Args:
        collator: the run's own.
        model: to be trained.
        args: the `TrainingArguments`.
    """
    half_on_gpu = args.device.type == "cuda" and (args.fp16 or args.bf16)
    return TrimPaddingCollator(collator, kind_of(model) in TOKEN_KINDS, pad_to_multiple_of=8 if half_on_gpu else None)
