"""Files and models for the example scripts: a table of tasks, each with its rows, its script and the head of its models."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.tiny_models import tiny_model
from tests.tiny_text import BAD, GOOD, NOUNS, WORDS, sentence, sentences, tokenizer

SCRIPTS = Path(__file__).parent / "example_scripts"
ROWS = 20
TRAINING = 12


def named(*labels: str) -> dict[str, Any]:
    return {"num_labels": len(labels), "id2label": dict(enumerate(labels)), "label2id": {label: i for i, label in enumerate(labels)}}


def tags(text: str) -> dict[str, Any]:
    words = text.split()
    return {"tokens": words, "ner_tags": ["B-NOUN" if w in NOUNS else "B-ADJ" if w in (*GOOD, *BAD) else "O" for w in words]}


def answer(text: str) -> dict[str, Any]:
    return {"question": "was the bed good", "context": text, "answer": text.split()[1], "start": text.index(text.split()[1])}


def choices(text: str) -> dict[str, Any]:
    generator = random.Random(text)
    endings = {f"ending{number}": sentence(generator, generator.choice((GOOD, BAD))) for number in range(4)}
    return {"sent1": text, **endings, "label": len(text) % 4}


def pair(text: str) -> dict[str, Any]:
    return {"premise": text, "hypothesis": " ".join(text.split()[:4]), "label": ("entailment", "neutral", "other")[sum(map(ord, text)) % 3]}


def several(text: str) -> dict[str, Any]:
    found = {"bad": any(word in BAD for word in text.split()), "good": any(word in GOOD for word in text.split()), "very": "very" in text}
    return {"sentence": text, "label": [label for label, there in found.items() if there]}


def number(text: str) -> dict[str, Any]:
    return {"sentence": text, "label": float(len(text.split()))}


def summary(text: str) -> dict[str, Any]:
    return {"source": text, "target": " ".join(text.split()[1:4])}


def translation(text: str) -> dict[str, Any]:
    return {"source": text, "target": " ".join(reversed(text.split()))}


DECODER = {"pad_token_id": 0, "bos_token_id": 2, "eos_token_id": 3}


@dataclass(frozen=True)
class Task:
    """What a script is run on.

    Attributes:
        script: its file.
        row: a row of its files, from a sentence.
        head: of the teacher, and of the model that the script begins with where `begins_with` is None.
        metric: that the script computes.
        architecture, config: of both models.
        begins_with: the head that the script's own model was saved with.
        flags: the script's own.
        trainer: for `--trainer_class`.
        scored: the teacher is asked for its own score first.
        repeated: how often each row stands in its file.
    """

    script: str
    row: Callable[[str], dict[str, Any]]
    head: str
    metric: str
    architecture: str = "bert"
    config: dict[str, Any] = field(default_factory=dict)
    begins_with: str | None = "base"
    flags: tuple[str, ...] = ()
    trainer: str = "DistillTrainer"
    scored: bool = True
    repeated: int = 1


TASKS: dict[str, Task] = {
    "ner": Task("run_ner.py", tags, "token_classification", "accuracy", config=named("B-ADJ", "B-NOUN", "O")),
    "qa": Task("run_qa.py", answer, "question_answering", "exact_match", flags=("--max_seq_length", "14"), scored=False),
    "swag": Task("run_swag.py", choices, "multiple_choice", "accuracy"),
    "xnli": Task("run_classification.py", pair, "sequence_classification", "accuracy", config=named("entailment", "neutral", "other")),
    "multi_label": Task(
        "run_classification.py",
        several,
        "sequence_classification",
        "hamming",
        config={**named("bad", "good", "very"), "problem_type": "multi_label_classification"},
    ),
    "regression": Task(
        "run_classification.py", number, "sequence_classification", "mse", config={"num_labels": 1, "problem_type": "regression"}
    ),
    "mlm": Task(
        "run_lm.py",
        lambda text: {"text": text},
        "masked_lm",
        "accuracy",
        begins_with=None,
        flags=("--masked", "True", "--max_seq_length", "16"),
        repeated=4,
    ),
    "clm": Task(
        "run_lm.py",
        lambda text: {"text": text},
        "causal_lm",
        "accuracy",
        architecture="llama",
        config=DECODER,
        begins_with=None,
        flags=("--max_seq_length", "16"),
        repeated=4,
    ),
    "summarization": Task(
        "run_seq2seq.py",
        summary,
        "seq2seq_lm",
        "shared_words",
        architecture="t5",
        config={"pad_token_id": 0, "decoder_start_token_id": 0, "eos_token_id": 3},
        begins_with=None,
        flags=("--predict_with_generate", "True"),
        trainer="Seq2SeqDistillTrainer",
        scored=False,
    ),
    "translation": Task(
        "run_seq2seq.py",
        translation,
        "seq2seq_lm",
        "shared_words",
        architecture="bart",
        config={**DECODER, "decoder_start_token_id": 3},
        begins_with=None,
        flags=("--predict_with_generate", "True"),
        trainer="Seq2SeqDistillTrainer",
        scored=False,
    ),
}


def write_files(task: Task, folder: Path) -> list[str]:
    """The task's files, and the script's flags that name them."""
    rows = [json.dumps(task.row(text)) for text in sentences(ROWS, seed=3)]
    for name, part in (("train", rows[:TRAINING]), ("validation", rows[TRAINING:])):
        (folder / f"{name}.json").write_text("\n".join(part * task.repeated) + "\n")
    return ["--train_file", str(folder / "train.json"), "--validation_file", str(folder / "validation.json")]


def write_model(task: Task, folder: Path, *, teacher: bool) -> str:
    """A model of four layers, with its tokenizer: the teacher with the task's head, or the one that the script begins with."""
    head = task.head if teacher else task.begins_with or task.head
    config = task.config if teacher or head != "base" else {}
    model = tiny_model(task.architecture, head=head, seed=2 if teacher else 1, vocab_size=len(WORDS), **config)
    if head == "multiple_choice":
        model.classifier.weight.data.mul_(30)  # else the choices are all but equal
    model.save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return str(folder)
