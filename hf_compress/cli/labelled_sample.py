"""A sample of labelled texts for a command that asks the gradient of the loss, read as `scripts/run_glue.py` reads its training data."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import datasets
from torch import Tensor
from transformers import AutoTokenizer, DataCollatorWithPadding, PreTrainedModel, PreTrainedTokenizerBase

from hf_compress.errors import ArgumentError, DataError, TeacherError
from hf_compress.scripts.run_glue import DataArguments, label_names, load_splits, tokenized
from hf_compress.task import kind_of
from hf_compress.teacher_checks import labels_of


def labelled_sample(
    model: PreTrainedModel, source: str, arguments: DataArguments, *, num_examples: int, batch_size: int, seed: int
) -> Iterator[dict[str, Tensor]]:
    """Batches of a model's inputs and labels, of examples drawn at random.

    Args:
        model: a sequence classifier, which says what its labels are called.
        source: where it came from; its tokenizer lies there.
        arguments: which data; its training split is read.
        num_examples: how many; all, where there are fewer.
        batch_size: examples in a batch, which is padded to its longest.
        seed: which examples.

    Yields:
        Dicts of tensors (batch, tokens), with `labels` (batch,).

    Raises:
        ArgumentError: the model is no sequence classifier.
        DataError: the data cannot be read, or has other labels than the model.
        TeacherError: there is no tokenizer beside the model.
    """
    if kind_of(model) != "sequence_classification":
        raise ArgumentError(
            f"The teacher is a {type(model).__name__}, and this command reads texts with a label each, for models that end in "
            "ForSequenceClassification. For others call prune_student(teacher, batches, ...) in Python, with batches of your own."
        )
    tokenizer = tokenizer_beside(source)
    try:
        splits = load_splits(arguments, None)
        names = None if arguments.task_name == "stsb" else label_names(splits)
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        raise DataError(f"The examples cannot be read: {error}") from error
    ids = label_ids(names, model)
    train = splits["train"]
    drawn = train.shuffle(seed=seed).select(range(min(num_examples, len(train))))
    by_name = None if names is None else {name: index for index, name in enumerate(names)}
    rows = tokenized(datasets.DatasetDict(train=drawn), tokenizer, arguments, by_name)["train"]
    columns = [name for name in rows.column_names if name in tokenizer.model_input_names]
    collate: Any = DataCollatorWithPadding(tokenizer)
    for start in range(0, len(rows), batch_size):
        part = rows.select(range(start, min(start + batch_size, len(rows))))
        examples = [{**{name: row[name] for name in columns}, "label": _label(row["label"], ids)} for row in part]
        yield dict(collate(examples))


def label_ids(names: Sequence[str] | None, model: PreTrainedModel) -> list[int] | None:
    """The model's id for each label of the data.

    Args:
        names: of the data, in the order of its ids; None for numbers that are to be predicted.
        model: a sequence classifier.

    Returns:
        By the data's id the model's; None for numbers.

    Raises:
        DataError: they tell other things apart.
    """
    theirs = labels_of(model)
    if names is None or len(theirs) == 1:
        if names is None and len(theirs) == 1:
            return None
        found = "numbers" if names is None else f"the labels {', '.join(names)}"
        raise DataError(
            f"The examples have {found}, and the teacher predicts "
            f"{'one number' if len(theirs) == 1 else 'the labels ' + ', '.join(theirs)}. Take the data that it was fine-tuned on."
        )
    ours, known = [name.lower() for name in names], [name.lower() for name in theirs]
    if set(ours) == set(known):
        return [known.index(name) for name in ours]
    nameless = [all(name in (str(index), f"label_{index}") for index, name in enumerate(each)) for each in (ours, known)]
    if len(ours) == len(known) and any(nameless):
        return list(range(len(ours)))  # one side has numbers for names: their order is all there is to go by
    raise DataError(
        f"The examples have the labels {', '.join(names)}, and the teacher knows {', '.join(theirs)}. Take the data that it was "
        "fine-tuned on."
    )


def _label(value: Any, ids: list[int] | None) -> int | float:
    return float(value) if ids is None else ids[value]


def tokenizer_beside(source: str) -> PreTrainedTokenizerBase:
    """The tokenizer of a folder or name.

    Raises:
        TeacherError: there is none.
    """
    try:
        found: PreTrainedTokenizerBase | None = AutoTokenizer.from_pretrained(source)
    except (OSError, ValueError):
        found = None
    # Where there are no files, transformers 5 makes a tokenizer that knows its special tokens and no word.
    if found is None or len(found) <= len(found.all_special_tokens):
        raise TeacherError(f"There is no tokenizer in {source}, and the examples are texts. Put the teacher's tokenizer beside it.")
    return found
