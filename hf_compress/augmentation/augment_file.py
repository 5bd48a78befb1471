"""From a file of examples to a larger one: checks, price, copies, and the whole at once.

    read -> check -> price -> some examples -> OUT.partial -> some examples -> OUT.partial -> ... -> OUT, whole

The rows of the output: each example in order, followed by its copies with another first text, and then those with another second one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import xxhash
from datasets import Dataset
from tqdm.auto import tqdm

from hf_compress.augmentation.augmenter import Augmenter, Texts, with_copies
from hf_compress.augmentation.masked_lm import load_masked_lm
from hf_compress.augmentation.partial_file import PartialFile
from hf_compress.augmentation.price import measure_price, sample
from hf_compress.augmentation.settings import AugmentationSettings
from hf_compress.augmentation.suffixes import check_output, suffix_of
from hf_compress.augmentation.tables import Row, choose_text_columns, read_table, typed, write_table
from hf_compress.augmentation.words import spans_of
from hf_compress.errors import DataError

# Copies made together. With few of them the last words of the longest sentences are asked about in small batches.
_TOGETHER = {"cuda": 8192}
_TOGETHER_ON_CPU = 1024


@dataclass(frozen=True)
class Augmented:
    """What was written.

    Attributes:
        path: the file.
        examples, rows: how many there were before and after.
    """

    path: Path
    examples: int
    rows: int


def augment_file(
    source: str,
    output: str | Path,
    settings: AugmentationSettings,
    *,
    mlm: str | None = None,
    vectors: str | None = None,
    text_columns: Sequence[str] | None = None,
    batch_tokens: int | None = None,
    overwrite: bool = False,
    say: Callable[[str], object] = print,
) -> Augmented:
    """Write a file of examples with copies of their texts.

    Args:
        source: a .csv, .tsv, .json, .jsonl or .parquet file, or a name for `load_dataset` with its configuration behind a colon.
        output: a file of one of these kinds.
        settings: how.
        mlm: a masked LM, a folder or a name on the hub; None to use vectors alone.
        vectors: a text file of GloVe or word2vec; None to use the masked LM alone.
        text_columns: whose texts are copied; None for the first one or two columns of texts.
        batch_tokens: tokens a forward, padding included.
        overwrite: whether `output` may be replaced.
        say: is told the price, and where a stopped run goes on.

    Raises:
        ArgumentError: `output` cannot be written, or the masked LM will not do.
        DataError: no examples, no such columns, broken vectors, or no word that has a vector.
        CacheError: the disk is full.
    """
    output = Path(output)
    check_output(output, source, overwrite=overwrite)
    table = read_table(source)
    columns = choose_text_columns(table, text_columns, source)
    model, tokenizer = (None, None) if mlm is None else load_masked_lm(mlm)
    augmenter = Augmenter(columns, model, tokenizer, vectors=vectors, batch_tokens=batch_tokens, **asdict(settings))
    _refuse_foreign_vectors(augmenter, table, vectors)
    asked = {**asdict(settings), "mlm": mlm, "vectors": vectors, "text_columns": columns, "examples": _hash(table, columns)}
    partial = PartialFile(output, asked, overwrite=overwrite)
    try:
        _make_copies(augmenter, table, partial, say)
        if suffix_of(source) in ("csv", "tsv") and suffix_of(output) not in ("csv", "tsv"):
            table = typed(table)
        rows = write_table(output, table, _rows(table, columns, partial))
        partial.remove()
    finally:
        partial.close()
    return Augmented(output, len(table), rows)


def _make_copies(augmenter: Augmenter, table: Dataset, partial: PartialFile, say: Callable[[str], object]) -> None:
    """Copies of the examples that have none yet."""
    left = len(table) - partial.done
    if partial.done:
        say(f"{partial.done:,} of {len(table):,} examples are done: going on with {partial.path}")
    if not left:
        return
    columns = augmenter.text_columns
    say(f"texts: {', '.join(columns)}")
    say(str(measure_price(augmenter, _texts(table.select([partial.done + place for place in sample(left)]), columns), left)))
    device = augmenter.masked_words.model.device.type if augmenter.masked_words else "cpu"
    together = max(1, _TOGETHER.get(device, _TOGETHER_ON_CPU) // (len(columns) * augmenter.settings.num_copies))
    with tqdm(total=len(table), initial=partial.done, desc="augmenting", unit="ex") as bar:
        for start in range(partial.done, len(table), together):
            copies = augmenter.copies(_texts(table.select(range(start, min(start + together, len(table)))), columns))
            partial.add(copies)
            bar.update(len(copies))


def _rows(table: Dataset, columns: Sequence[str], partial: PartialFile) -> Iterator[Row]:
    """The rows of the output."""
    done = partial.rows()
    for row in table:
        row_copies = next(done)
        for texts in with_copies(tuple(row[column] for column in columns), row_copies):
            yield {**row, **dict(zip(columns, texts, strict=True))}


def _texts(table: Dataset, columns: Sequence[str]) -> list[Texts]:
    part: dict[str, list[Any]] = table[:]
    return list(zip(*(part[column] for column in columns), strict=True))


def _refuse_foreign_vectors(augmenter: Augmenter, table: Dataset, source: str | None) -> None:
    """Refuse vectors that have none of the data's words, before any is looked up."""
    if augmenter.vectors is None:
        return
    texts = (text for row in table for text in (row[column] for column in augmenter.text_columns))
    words = (text[start:end] for text in texts for start, end in spans_of(text))
    seen = list(islice(words, 5))
    if not any(word in augmenter.vectors for word in seen) and not any(word in augmenter.vectors for word in words):
        raise DataError(
            f"--vectors {source}: no word of the texts has a vector there; looked up were {', '.join(seen) or 'none'} and all others, as "
            "they are and in lower case. Give vectors of the texts' language."
        )


def _hash(table: Dataset, columns: Sequence[str]) -> str:
    """Of all texts that are copied."""
    digest = xxhash.xxh3_128()
    for start in range(0, len(table), 1000):
        for text in (text for texts in _texts(table.select(range(start, min(start + 1000, len(table)))), columns) for text in texts):
            data = text.encode()
            digest.update(len(data).to_bytes(8, "little"))
            digest.update(data)
    return digest.hexdigest()
