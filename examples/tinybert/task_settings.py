"""What TinyBERT sets for each GLUE task (1909.10351, section 4.2), and what its released code does."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Source = Literal["paper", "released_code"]


@dataclass(frozen=True)
class TaskSettings:
    """Of one task.

    Attributes:
        max_seq_length: tokens an example: 64 for one sentence, 128 for a pair.
        intermediate_epochs: over the augmented data, layers only.
        num_copies: of each text.
        prediction_on_original: whether the predictions are learnt from the original examples, not from the augmented ones.
    """

    max_seq_length: int = 128
    intermediate_epochs: int = 20
    num_copies: int = 20
    prediction_on_original: bool = False


PREDICTION_EPOCHS = 3

# The paper: 20 epochs, 10 for the three large tasks, 50 for CoLA; 20 copies everywhere.
PAPER: dict[str, TaskSettings] = {
    "cola": TaskSettings(max_seq_length=64, intermediate_epochs=50),
    "mnli": TaskSettings(intermediate_epochs=10),
    "mrpc": TaskSettings(),
    "qnli": TaskSettings(intermediate_epochs=10),
    "qqp": TaskSettings(intermediate_epochs=10),
    "rte": TaskSettings(),
    "sst2": TaskSettings(max_seq_length=64),
    "stsb": TaskSettings(prediction_on_original=True),
    "wnli": TaskSettings(),
}

# The code's table of epochs and lengths (which a slip in its names keeps from being used), and the copies of its augmentation.
RELEASED_CODE: dict[str, TaskSettings] = {
    "cola": TaskSettings(max_seq_length=64, intermediate_epochs=50, num_copies=30),
    "mnli": TaskSettings(intermediate_epochs=5, num_copies=10),
    "mrpc": TaskSettings(num_copies=30),
    "qnli": TaskSettings(intermediate_epochs=10),
    "qqp": TaskSettings(intermediate_epochs=5, num_copies=10),
    "rte": TaskSettings(num_copies=30),
    "sst2": TaskSettings(max_seq_length=64, intermediate_epochs=10),
    "stsb": TaskSettings(num_copies=30, prediction_on_original=True),
    "wnli": TaskSettings(num_copies=30),
}


def settings_of(task_name: str | None, source: Source = "paper") -> TaskSettings:
    """The settings of a task; those of a small task of pairs for data that is no task of GLUE."""
    table = PAPER if source == "paper" else RELEASED_CODE
    return table.get(task_name or "", TaskSettings())
