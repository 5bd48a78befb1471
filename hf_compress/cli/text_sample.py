"""A sample of texts for a command that looks at hidden states, read as `scripts/run_glue.py` reads its training data."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import datasets
from torch import Tensor
from transformers import DataCollatorWithPadding

from hf_compress.cli.labelled_sample import tokenizer_beside
from hf_compress.errors import DataError
from hf_compress.scripts.run_glue import DataArguments, load_splits, text_columns, tokenized

BATCH_SIZE = 32


def text_sample(source: str, arguments: DataArguments, *, num_examples: int, seed: int) -> Iterator[dict[str, Tensor]]:
    """Batches of a model's inputs, of examples drawn at random.

    Args:
        source: folder or name of the model; its tokenizer lies there.
        arguments: which data; its training split is read.
        num_examples: how many; all, where there are fewer.
        seed: which examples.

    Yields:
        Dicts of tensors (batch, tokens), each batch padded to its longest example.

    Raises:
        DataError: the data cannot be read.
        TeacherError: there is no tokenizer beside the model.
    """
    tokenizer = tokenizer_beside(source)
    try:
        splits = load_splits(arguments, None)
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        raise DataError(f"The examples cannot be read: {error}") from error
    train = splits["train"]
    texts = train.select_columns(list(text_columns(arguments.task_name, splits)))
    drawn = texts.shuffle(seed=seed).select(range(min(num_examples, len(texts))))
    rows = tokenized(datasets.DatasetDict(train=drawn), tokenizer, arguments, None)["train"]
    columns = [name for name in rows.column_names if name in tokenizer.model_input_names]
    collate: Any = DataCollatorWithPadding(tokenizer)
    for start in range(0, len(rows), BATCH_SIZE):
        part = rows.select(range(start, min(start + BATCH_SIZE, len(rows))))
        yield dict(collate([{name: row[name] for name in columns} for row in part]))
