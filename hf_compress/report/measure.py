"""Accuracy and time of contenders. They take turns, so that what else the machine does slows all of them alike."""

from __future__ import annotations

import statistics
import time
from collections.abc import Mapping, Sequence

from hf_compress.errors import DataError
from hf_compress.report.contenders import Contender
from hf_compress.report.corpus import Example

BATCH_SIZE = 32


def accuracy(contender: Contender, examples: Sequence[Example], *, batch_size: int = 8 * BATCH_SIZE) -> float:
    """Share of the examples, from 0 to 1, that get their own label.

    Raises:
        DataError: there are no examples.
    """
    if not examples:
        raise DataError("There are no examples to measure accuracy on.")
    right = 0
    for start in range(0, len(examples), batch_size):
        batch = examples[start : start + batch_size]
        right += sum(label == example.label for label, example in zip(contender.predict(batch), batch, strict=True))
    return right / len(examples)


def milliseconds_per_example(
    contenders: Mapping[str, Contender], examples: Sequence[Example], *, repeats: int = 15, batch_size: int = BATCH_SIZE
) -> dict[str, float]:
    """Milliseconds from text to label, an example: the median over `repeats` batches of `batch_size`.

    In each round every contender labels the same batch, another one first each time; a first round goes unmeasured.

    Raises:
        DataError: fewer examples than one batch.
    """
    if len(examples) < batch_size:
        raise DataError(f"Time is measured on batches of {batch_size} examples, but there are {len(examples)}.")
    names = list(contenders)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for turn in range(-1, repeats):
        start = max(turn, 0) * batch_size % (len(examples) - batch_size + 1)
        batch = examples[start : start + batch_size]
        first = turn % len(names)
        for name in names[first:] + names[:first]:
            started = time.perf_counter()
            contenders[name].predict(batch)
            if turn >= 0:
                seconds[name].append(time.perf_counter() - started)
    return {name: 1000 * statistics.median(times) / batch_size for name, times in seconds.items()}
