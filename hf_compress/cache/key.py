"""An example is known by its content: 128 bits of what the teacher reads, unpadded.

So there is no column of numbers to lose, and shuffling, epochs, resuming, other world sizes, grouping by length and duplicates cannot make
teacher and student speak of different examples. In multiple choice each choice is a text of its own, and has a key of its own.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import xxhash
from torch import Tensor

from hf_compress.errors import DataError

Keys = npt.NDArray[np.uint64]
Integers = npt.NDArray[np.int64]

# What a model may be given beside its text: it changes nothing of what the text is.
_NOT_CONTENT = frozenset({"attention_mask", "labels", "label", "label_ids", "start_positions", "end_positions"})


@dataclass(frozen=True)
class Canonical:
    """The examples of one batch as the teacher reads them, without padding.

    Attributes:
        columns: by name, (examples, tokens) int64, padded as the batch was; a column of zeros only is left out.
        starts: (examples,) where each example's first real token stands.
        lengths: (examples,) how many real tokens it has.
        width: tokens in the batch, padding included.
        choices: how many texts, one after the other, are the choices of one example; None where an example is one text.
    """

    columns: dict[str, Integers]
    starts: Integers
    lengths: Integers
    width: int
    choices: int | None = None

    def __len__(self) -> int:
        return len(self.lengths)

    def rows(self, name: str, example: int) -> Integers:
        """One example's real values in one column."""
        start = self.starts[example]
        return self.columns[name][example, start : start + self.lengths[example]]

    def take(self, examples: Sequence[int]) -> Canonical:
        """Some of the examples."""
        chosen = np.array(examples, dtype=np.int64)
        columns = {name: values[chosen] for name, values in self.columns.items()}
        return Canonical(columns, self.starts[chosen], self.lengths[chosen], self.width, self.choices)

    def keys(self) -> Keys:
        """(examples, 2) uint64, the high word first.

        The hash is XXH3-128 over, for each column in the order of names: the name in UTF-8, a zero byte, the number of tokens as 8 bytes
        (little endian), the values as 8 bytes each.
        """
        keys = np.empty((len(self), 2), dtype=np.uint64)
        for example in range(len(self)):
            digest = xxhash.xxh3_128()
            for name in sorted(self.columns):
                values = self.rows(name, example)
                if name != "input_ids" and not values.any():
                    continue  # no token types are token types of zero
                digest.update(name.encode() + b"\0" + len(values).to_bytes(8, "little"))
                digest.update(np.ascontiguousarray(values).data)
            number = digest.intdigest()
            keys[example] = number >> 64, number & 0xFFFFFFFFFFFFFFFF
        return keys


def canonical_examples(inputs: Mapping[str, Any], columns: frozenset[str], *, pad_token_id: int | None = None) -> Canonical:
    """Read a batch as the teacher would.

    Args:
        inputs: a batch as a collator gives it, on any device (it is copied to the CPU).
        columns: the names of what the teacher's forward takes.
        pad_token_id: tells padding from text where there is no attention_mask; None where it cannot (no padding token, or the end token).

    Raises:
        DataError: if examples cannot be told from padding, or are more than token ids.
    """
    read = {name: value for name, value in inputs.items() if isinstance(value, Tensor) and name in columns and name not in _NOT_CONTENT}
    ids = read.get("input_ids")
    if ids is None or ids.dim() not in (2, 3):
        raise DataError(
            f"A teacher on disk knows examples by their input_ids, (batch, tokens) or (batch, choices, tokens), but the batch has "
            f"{_described(inputs)}. Distil from a live teacher: leave --teacher_cache_dir out."
        )
    arrays: dict[str, Integers] = {}
    for name, value in read.items():
        if value.is_floating_point() or value.shape != ids.shape:
            raise DataError(
                f"The teacher reads the column {name}, {tuple(value.shape)} {value.dtype}, beside input_ids {tuple(ids.shape)}: a teacher "
                "on disk holds text with one number a token. Leave that column out, or distil from a live teacher (no --teacher_cache_dir)."
            )
        arrays[name] = value.detach().cpu().numpy().astype(np.int64, copy=False)
    width = ids.shape[-1]
    starts, lengths = _runs(_real_tokens(inputs, arrays["input_ids"], pad_token_id).reshape(-1, width))
    rows = {name: values.reshape(-1, width) for name, values in arrays.items()}  # the choices of an example, one after the other
    return Canonical(rows, starts, lengths, width, ids.shape[1] if ids.dim() == 3 else None)


def _real_tokens(inputs: Mapping[str, Any], ids: Integers, pad_token_id: int | None) -> npt.NDArray[np.bool_]:
    mask = inputs.get("attention_mask")
    if isinstance(mask, Tensor) and mask.shape == ids.shape:
        real: npt.NDArray[np.bool_] = mask.detach().cpu().numpy().astype(bool)
        return real
    if mask is not None or pad_token_id is None:
        raise DataError(
            f"The batch has {_described(inputs)}: padding cannot be told from text in it. Keep an attention_mask of the shape of input_ids "
            "(a collator that pads: DataCollatorWithPadding), not packed rows."
        )
    told: npt.NDArray[np.bool_] = ids != pad_token_id
    return told


def _runs(real: npt.NDArray[np.bool_]) -> tuple[Integers, Integers]:
    """Where the real tokens begin, and how many there are; padding may be on either side."""
    lengths = real.sum(1).astype(np.int64)
    starts = real.argmax(1).astype(np.int64)
    last = real.shape[1] - 1 - real[:, ::-1].argmax(1)
    holes = (lengths > 0) & (last - starts + 1 != lengths)
    if holes.any():
        raise DataError(
            f"{int(holes.sum())} of {len(real)} examples of the batch have padding in the middle (row {int(holes.argmax())}): what the "
            "teacher reads of them is not one text. Pad on one side only."
        )
    return starts, lengths


def _described(inputs: Mapping[str, Any]) -> str:
    shapes = [f"{name} {tuple(value.shape)}" for name, value in inputs.items() if isinstance(value, Tensor)]
    return ", ".join(shapes) or "no tensors"
