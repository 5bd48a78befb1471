"""The demo's rows, and the table that shows them: on a terminal, in Markdown, in JSON, always from the same cells."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

from rich import box
from rich.table import Table

Training = Literal["labels", "distilled", "from disk"]


@dataclass(frozen=True)
class Row:
    """What was measured of one contender.

    Attributes:
        name: what it is, as "narrow student".
        training: "labels" if only labels taught it, "distilled" if the teacher did, "from disk" if what it had stored did.
        parameters: their number.
        megabytes: 10^6 bytes of parameters in memory.
        milliseconds: from text to label, an example.
        training_seconds: by the clock; with what it took to store what the teacher says, where it was stored.
        accuracy: share of the test set, from 0 to 1.
        teacher_share: accuracy / the teacher's accuracy.
        stored_bytes: what the teacher on disk takes; None where there is none.
    """

    name: str
    training: Training
    parameters: int
    megabytes: float
    milliseconds: float
    training_seconds: float
    accuracy: float
    teacher_share: float
    stored_bytes: int | None = None

    def cells(self) -> tuple[str, ...]:
        """As they are printed; one for each of `HEADINGS`."""
        return (
            self.name,
            self.training if self.stored_bytes is None else f"{self.training}, {self.stored_bytes / 1e3:.0f} kB",
            f"{self.parameters:,}",
            f"{self.megabytes:.3f}",
            f"{self.milliseconds:.3f}",
            f"{self.training_seconds:.1f}",
            f"{100 * self.accuracy:.1f}%",
            f"{100 * self.teacher_share:.1f}%",
        )


HEADINGS = ("model", "learnt from", "parameters", "MB", "ms an example", "training s", "accuracy", "of teacher's")


def rich_table(rows: Sequence[Row], *, title: str) -> Table:
    """The table for a terminal; distilled rows stand out."""
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, padding=0, pad_edge=False)
    for index, heading in enumerate(("model", "learnt", "params", "MB", "ms", "train s", "right", "kept")):  # in 80 columns
        table.add_column(heading, justify="left" if index < 2 else "right", no_wrap=True)
    for row in rows:
        table.add_row(*row.cells(), style="" if row.training == "labels" else "bold green")
    return table


def markdown_table(rows: Sequence[Row]) -> str:
    """The same table in Markdown."""
    lines = [HEADINGS, tuple("---" if index < 2 else "---:" for index in range(len(HEADINGS))), *(row.cells() for row in rows)]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def json_rows(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """The same rows with all their digits."""
    return [asdict(row) for row in rows]
