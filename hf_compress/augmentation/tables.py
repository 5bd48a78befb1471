"""Tables of examples: from a file or a data set of the hub, and to a file.

.csv      comma, quotes where needed     .tsv    tabs, no quotes at all, as GLUE's
.json     .jsonl: an object a line; a .json that is one list of objects is read as well
.parquet  with the features that datasets keeps there, such as the names of the labels
else      a name for `load_dataset`, its train split: nyu-mll/glue:mrpc
"""

from __future__ import annotations

import csv
import io
import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
from datasets import Dataset, load_dataset

from hf_compress.augmentation.suffixes import suffix_of
from hf_compress.cache.files import atomic_file
from hf_compress.errors import ArgumentError, DataError

Row = Mapping[str, Any]
_GROUP = 10_000  # rows of a parquet file's group, and of what is read at once
_NUMBERS = ("idx", "id", "index", "guid", "uid")


def read_table(source: str) -> Dataset:
    """The examples.

    Args:
        source: a file, or a name for `load_dataset` with its configuration behind a colon.

    Raises:
        DataError: there is nothing of that name, no example in it, or a broken line, with its number.
    """
    path, suffix = Path(source), suffix_of(source)
    if suffix is None and not path.is_file():
        table = _of_hub(source)
    elif not path.is_file():
        raise DataError(f"There is no file {source}.")
    elif suffix is None:
        raise DataError(f"{source} ends in '{path.suffix}', which is not known. Known: .csv, .tsv, .json, .jsonl, .parquet.")
    elif suffix == "parquet":
        table = _of_parquet(path)
    else:
        table = _of_json(path) if suffix == "json" else _of_csv(path, suffix)
    if not len(table):
        raise DataError(f"{source} holds no examples.")
    if len(table.column_names) < 2:
        raise DataError(
            f"{source} has the one column '{table.column_names[0]}'; expected texts and their labels. Is it separated by something else?"
        )
    return table


def choose_text_columns(table: Dataset, asked: Sequence[str] | None, source: str) -> list[str]:
    """The columns whose texts are copied.

    Args:
        table: the examples.
        asked: their names; None for the first one or two columns of texts that are not the label or a number.
        source: for messages.

    Raises:
        DataError: a column is missing, or holds something that is no text.
    """
    there = ", ".join(table.column_names)
    if asked is None:
        first = typed(table)[0] if all(isinstance(value, str) for value in table[0].values()) else table[0]  # .csv knows texts alone
        texts = [
            name for name in table.column_names if name not in _NUMBERS and not name.startswith("label") and isinstance(first[name], str)
        ]
        asked = ["sentence1", "sentence2"] if {"sentence1", "sentence2"} <= set(texts) else texts[:2]
        if not asked:
            raise DataError(f"{source} has no column of texts; its columns are: {there}. Name them with --text_columns.")
        for name in asked:
            different = len(set(table[name][:]))
            if different <= len(table) / 10:
                raise DataError(
                    f"The column '{name}' of {source} has only {different} different values in {len(table)} examples, as labels have. Name "
                    f"the columns of texts with --text_columns; there are: {there}."
                )
    for name in asked:
        if name not in table.column_names:
            raise DataError(f"{source} has no column '{name}'; its columns are: {there}. Name those of texts with --text_columns.")
        for start in range(0, len(table), _GROUP):
            for number, value in enumerate(table[start : start + _GROUP][name], start=start + 1):
                if not isinstance(value, str):
                    raise DataError(f"{source}: the column '{name}' holds {value!r} in example {number:,}, which is no text.")
    if len(set(asked)) < len(asked):
        raise ArgumentError(f"--text_columns names a column twice: {', '.join(asked)}.")
    return list(asked)


def write_table(path: Path, table: Dataset, rows: Iterator[Row]) -> int:
    """Write rows; the file appears whole or not at all.

    Args:
        path: where to, of a known suffix.
        table: of the same columns, whose features parquet files keep.
        rows: in order.

    Returns:
        How many there were.

    Raises:
        DataError: a text does not fit the format: a tab or a line's end in a .tsv.
        CacheError: the disk is full, or the folder cannot be written.
    """
    suffix = suffix_of(path)
    assert suffix is not None
    count = 0
    columns = list(table.column_names)
    with atomic_file(path, table.data.nbytes) as file:
        target: Any = _Bytes(file)
        if suffix == "parquet":
            with pyarrow.parquet.ParquetWriter(target, _schema(table)) as writer:
                for some in _groups(rows):
                    count += len(some)
                    writer.write_table(pyarrow.Table.from_pylist([dict(row) for row in some], schema=_schema(table)))
            return count
        text = io.TextIOWrapper(target, encoding="utf-8", newline="", write_through=True)
        write = _csv_writer(text, suffix, columns) if suffix != "json" else None
        for some in _groups(rows):
            count += len(some)
            if write is None:
                text.writelines(json.dumps({name: row[name] for name in columns}, ensure_ascii=False, default=str) + "\n" for row in some)
                continue
            try:
                write.writerows([_cell(row[name]) for name in columns] for row in some)
            except csv.Error as error:
                raise DataError(f"A text holds a tab or a line's end, which {path.name} cannot hold. Write a .csv or .parquet.") from error
        text.detach()
    return count


def typed(table: Dataset) -> Dataset:
    """A table of nothing but texts, as a .csv is read, with its whole numbers and fractions as numbers: for other formats."""
    columns: dict[str, Any] = {}
    for name in table.column_names:
        values = table[name][:]
        columns[name] = next((found for kind in (int, float) if (found := _all(values, kind)) is not None), values)
    return Dataset.from_dict(columns)


# --- reading ---


def _of_hub(source: str) -> Dataset:
    name, _, config = source.partition(":")
    try:
        return load_dataset(name, config or None, split="train")
    except Exception as error:  # whatever a data set's host, its files or its name give rise to
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise DataError(f"{source} is no file, and no data set with a train split was found: {reason}") from error


def _of_parquet(path: Path) -> Dataset:
    try:
        return Dataset(pyarrow.parquet.read_table(path, memory_map=True))
    except (pyarrow.ArrowException, OSError) as error:
        raise DataError(f"{path} cannot be read as parquet: {str(error).splitlines()[0]}") from error


def _of_json(path: Path) -> Dataset:
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(f"{path} cannot be read as UTF-8, as JSON is written: {error}. Save it in that encoding.") from error
    try:
        if text.lstrip().startswith("["):
            rows = json.loads(text)
        else:
            rows = []
            for number, line in enumerate(text.split("\n"), start=1):
                if line.strip():
                    rows.append(json.loads(line))
                    if not isinstance(rows[-1], dict):
                        raise DataError(
                            f"{path}, line {number:,} is no object; expected one example a line, as in " + '{"text": "...", ...}.'
                        )
    except json.JSONDecodeError as error:
        where = number if not text.lstrip().startswith("[") else error.lineno
        raise DataError(f"{path}, line {where:,} is no JSON: {error.msg}.") from error
    if not all(isinstance(row, dict) for row in rows):
        raise DataError(f"{path} is no list of objects; expected one example each.")
    try:
        return Dataset.from_list(rows)
    except pyarrow.ArrowException as error:
        raise DataError(f"{path}: a column holds values of different kinds: {str(error).splitlines()[0]}") from error


def _of_csv(path: Path, suffix: str) -> Dataset:
    with path.open(encoding="utf-8-sig", newline="") as file, _long_cells():
        reader = csv.reader(file, **_dialect(suffix))
        try:
            header = next(reader, [])
            columns: list[list[str]] = [[] for _ in header]
            if len(set(header)) < len(header):
                raise DataError(f"{path} names a column twice in its first line: {', '.join(header)}.")
            for cells in reader:
                if not cells:
                    continue
                if len(cells) != len(header):
                    raise DataError(
                        f"{path}, line {reader.line_num:,} has {len(cells)} columns; expected {len(header)}, as in its first line: "
                        f"{', '.join(header)}."
                    )
                for column, cell in zip(columns, cells, strict=True):
                    column.append(cell)
        except (csv.Error, UnicodeDecodeError) as error:
            raise DataError(f"{path}, line {reader.line_num:,} cannot be read: {error}.") from error
    if not header:
        raise DataError(f"{path} is empty.")
    return Dataset.from_dict(dict(zip(header, columns, strict=True)))


@contextmanager
def _long_cells() -> Iterator[None]:
    before = csv.field_size_limit(sys.maxsize)
    try:
        yield
    finally:
        csv.field_size_limit(before)


def _dialect(suffix: str) -> dict[str, Any]:
    return {"delimiter": "\t", "quoting": csv.QUOTE_NONE, "quotechar": None} if suffix == "tsv" else {"strict": True}


# --- writing ---


class _Bytes(io.RawIOBase):
    """What pyarrow and text writers want a file to be, over a file that is whole or not there."""

    def __init__(self, file: Any) -> None:
        super().__init__()
        self._file = file
        self._count = 0

    def writable(self) -> bool:
        """It is."""
        return True

    def write(self, data: Any) -> int:
        """Write all of it."""
        view = memoryview(data)
        self._file.write(view)
        self._count += view.nbytes
        return view.nbytes

    def tell(self) -> int:
        """How much was written."""
        return self._count


def _csv_writer(text: io.TextIOWrapper, suffix: str, columns: list[str]) -> Any:
    writer = csv.writer(text, lineterminator="\n", **{name: value for name, value in _dialect(suffix).items() if name != "strict"})
    writer.writerow(columns)
    return writer


def _cell(value: Any) -> Any:
    return json.dumps(value, ensure_ascii=False, default=str) if isinstance(value, (dict, list)) else value


def _groups(rows: Iterator[Row]) -> Iterator[list[Row]]:
    group: list[Row] = []
    for row in rows:
        group.append(row)
        if len(group) == _GROUP:
            yield group
            group = []
    if group:
        yield group


def _schema(table: Dataset) -> Any:
    return table.features.arrow_schema


def _all(values: Sequence[str], kind: type[int] | type[float]) -> list[Any] | None:
    """The values as numbers of a kind, if they are nothing else."""
    try:
        found = [kind(value) for value in values]
    except ValueError:
        return None
    return found if kind is float or all(str(number) == value for number, value in zip(found, values, strict=True)) else None
