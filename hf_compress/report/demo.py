"""`hf-compress demo`: the whole flow on a corpus that it writes itself, offline, in minutes.

    corpus -> tokenizer -> teacher -> two students, each with labels only and distilled -> table, picture, report
                                      one of them once more, from what the teacher has stored on disk

The students get few labelled examples, the teacher had many. All trainings of students have the same examples, steps, batches and
learning rate.
"""

from __future__ import annotations

import logging
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import torch
from rich.console import Console
from transformers import BertConfig, BertForSequenceClassification, PreTrainedModel, PreTrainedTokenizerFast
from transformers.utils import logging as transformers_logging

from hf_compress.arguments import CompressionArguments
from hf_compress.cache.reader import TeacherCache
from hf_compress.errors import ArgumentError
from hf_compress.losses.labels import LabelsLoss
from hf_compress.losses.loss import Loss
from hf_compress.losses.recipes import DEFAULT_RECIPE, losses_of
from hf_compress.report.contenders import BagOfWords, Contender, MajorityClass, Transformer
from hf_compress.report.corpus import LABELS, Example, with_wrong_labels, write_corpus
from hf_compress.report.document import DemoReport, fairness, from_disk, write_json, write_markdown
from hf_compress.report.measure import accuracy, milliseconds_per_example
from hf_compress.report.picture import draw_picture
from hf_compress.report.settings import DemoSettings
from hf_compress.report.table import Row, Training, rich_table
from hf_compress.report.tokenizer import to_dataset, train_tokenizer
from hf_compress.report.training import ProgressBars, train
from hf_compress.students.from_teacher import student_from_teacher

TEACHER, NARROW, KEPT = "teacher", "narrow student", "kept-layer student"
STUDENTS = (NARROW, KEPT)
MAJORITY, WORDS = "majority class", "bag of words"
BASELINES = (MAJORITY, WORDS)
THREADS = 2


@dataclass(frozen=True)
class Trained:
    """A contender, and the seconds of its training; `folder` where it lies on disk."""

    name: str
    training: Training
    contender: Contender
    seconds: float
    folder: Path | None = None
    stored_bytes: int | None = None


@dataclass
class Corpus:
    """The corpus in three parts, and the tokenizer that was trained on the first."""

    for_teacher: list[Example]
    for_students: list[Example]
    for_test: list[Example]
    tokenizer: PreTrainedTokenizerFast = field(init=False)

    def __post_init__(self) -> None:
        self.tokenizer = train_tokenizer(self.for_teacher)

    @classmethod
    def write(cls, settings: DemoSettings, seed: int) -> Corpus:
        """Write it; the students' examples get their share of wrong labels."""
        sizes = (settings.teacher_examples, settings.student_examples, settings.test_examples)
        for_teacher, for_students, for_test = write_corpus(sizes, seed=seed)
        wrong = settings.wrong_labels
        return cls(for_teacher, with_wrong_labels(for_students, wrong, seed=seed + 1), for_test)


def run_demo(
    output_dir: str | Path,
    *,
    seed: int = 0,
    grammar_seed: int = 0,
    scale: float = 1.0,
    settings: DemoSettings | None = None,
    console: Console | None = None,
) -> DemoReport:
    """Write the corpus, train all models, measure them, and write table, picture and report.

    Args:
        output_dir: gets report.md, report.json, picture.png and a folder for each model.
        seed: of the models' weights and of the order of the data.
        grammar_seed: of the corpus: its words, its sentences, which of them are for whom.
        scale: less than 1 is a shorter demo, which claims nothing.
        settings: other sizes.
        console: where progress and table are shown; by default the terminal.

    Raises:
        ArgumentError: the scale is out of range, or `output_dir` is a file.
    """
    started = time.perf_counter()
    settings = (settings or DemoSettings()).scaled(scale)
    folder, console = Path(output_dir), console or Console()
    if folder.exists() and not folder.is_dir():
        raise ArgumentError(f"{folder} is a file; the demo needs a folder for its report. Name another: --output_dir DIR.")
    folder.mkdir(parents=True, exist_ok=True)
    with _two_threads() as threads, _quiet_transformers():
        corpus = Corpus.write(settings, grammar_seed)
        _introduce(console, settings, corpus)
        baselines = [_baseline(MAJORITY, MajorityClass, corpus), _baseline(WORDS, BagOfWords, corpus)]
        with ProgressBars(console) as bars:
            models = train_models(corpus, settings, folder, bars, seed)
        rows = measure_all([*baselines, *models], corpus.for_test)
    console.print(rich_table(rows, title="Test set: the same examples for all"))
    report = DemoReport(
        rows=rows,
        settings=settings,
        seed=seed,
        grammar_seed=grammar_seed,
        threads=threads,
        seconds=time.perf_counter() - started,
        examples=tuple(corpus.for_test[:6]),
        models={_full_name(each.name, each.training): each.folder for each in models if each.folder is not None},
        files={name: folder / name for name in ("report.md", "report.json", "picture.png")},
        scale=scale,
    )
    draw_picture(rows, report.files["picture.png"], students=STUDENTS, lines=BASELINES)
    write_json(report)
    write_markdown(report, STUDENTS, NARROW)
    _say_where(console, report)
    return report


def train_models(corpus: Corpus, settings: DemoSettings, folder: Path, bars: ProgressBars, seed: int) -> list[Trained]:
    """Train the teacher, then each student from the same start: with labels only, and distilled; the narrow one from disk as well."""
    students: list[tuple[str, Training]] = [(name, how) for name in STUDENTS for how in ("labels", "distilled")]
    names: list[tuple[str, Training]] = [(TEACHER, "labels"), *students, (NARROW, "from disk")]
    schedules = {name: settings.teacher_schedule if name == TEACHER else settings.student_schedule for name, _ in names}
    tasks = {(name, how): bars.add(_full_name(name, how), schedules[name].steps) for name, how in names}
    datasets = {True: to_dataset(corpus.for_teacher, corpus.tokenizer), False: to_dataset(corpus.for_students, corpus.tokenizer)}
    places = {(name, how): folder / _full_name(name, how).replace(" ", "_").replace(",", "") for name, how in names}
    teacher, cache = places[TEACHER, "labels"], folder / "teacher_on_disk"
    shutil.rmtree(cache, ignore_errors=True)  # an earlier demo's
    trained = []
    for name, how in names:
        model = new_teacher(settings, corpus.tokenizer, seed) if name == TEACHER else new_student(name, settings, teacher, seed)
        seconds = train(
            model,
            datasets[name == TEACHER],
            corpus.tokenizer,
            schedules[name],
            losses=losses(how, settings),
            teacher=None if how == "labels" else teacher,
            compression=None if how != "from disk" else stored_teacher(cache, settings),
            output_dir=places[name, how],
            bars=bars,
            task=tasks[name, how],
            seed=seed,
        )
        size = TeacherCache(cache).manifest.bytes if how == "from disk" else None
        trained.append(Trained(name, how, Transformer.load(places[name, how]), seconds, places[name, how], size))
    return trained


def stored_teacher(folder: Path, settings: DemoSettings) -> CompressionArguments:
    """Store what the teacher says before training, and train from that: the teacher is let go."""
    return CompressionArguments(teacher_cache_dir=str(folder), hidden_states_selection=settings.stored)


def new_teacher(settings: DemoSettings, tokenizer: PreTrainedTokenizerFast, seed: int) -> BertForSequenceClassification:
    """A small BERT with random weights."""
    config = BertConfig(
        vocab_size=len(tokenizer),
        hidden_size=settings.hidden_size,
        num_hidden_layers=settings.num_hidden_layers,
        num_attention_heads=settings.num_attention_heads,
        intermediate_size=settings.intermediate_size,
        max_position_embeddings=tokenizer.model_max_length,
        initializer_range=settings.initializer_range,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        pad_token_id=tokenizer.pad_token_id,
        id2label=dict(enumerate(LABELS)),
        label2id={label: number for number, label in enumerate(LABELS)},
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return BertForSequenceClassification(config)


def new_student(name: str, settings: DemoSettings, teacher: Path, seed: int) -> PreTrainedModel:
    """One of `STUDENTS`, untrained, made of the teacher in that folder."""
    if name == KEPT:
        return student_from_teacher(str(teacher), layers_to_keep=settings.layers_to_keep)
    return student_from_teacher(
        str(teacher),
        num_hidden_layers=settings.narrow_layers,
        hidden_size=settings.narrow_hidden_size,
        num_attention_heads=settings.num_attention_heads,
        intermediate_size=settings.narrow_intermediate_size,
        seed=seed,
    )


def losses(training: Training, settings: DemoSettings) -> list[Loss]:
    """What a student learns from."""
    if training == "labels":
        return [LabelsLoss()]
    return losses_of(DEFAULT_RECIPE, temperature=settings.temperature)


def measure_all(trained: list[Trained], examples: list[Example]) -> tuple[Row, ...]:
    """The rows of the table."""
    contenders = {_full_name(each.name, each.training): each.contender for each in trained}
    accuracies = {name: accuracy(contender, examples) for name, contender in contenders.items()}
    milliseconds = milliseconds_per_example(contenders, examples)
    rows = []
    for each in trained:
        name = _full_name(each.name, each.training)
        parameters, size = each.contender.size()
        rows.append(
            Row(
                name=each.name,
                training=each.training,
                parameters=parameters,
                megabytes=size / 1e6,
                milliseconds=milliseconds[name],
                training_seconds=each.seconds,
                accuracy=accuracies[name],
                teacher_share=accuracies[name] / accuracies[_full_name(TEACHER, "labels")],
                stored_bytes=each.stored_bytes,
            )
        )
    return tuple(rows)


def _full_name(name: str, training: Training) -> str:
    if name not in STUDENTS:
        return name
    return f"{name}, {'labels only' if training == 'labels' else training}"


def _baseline(name: str, kind: type[MajorityClass] | type[BagOfWords], corpus: Corpus) -> Trained:
    started = time.perf_counter()
    contender = kind(corpus.for_teacher)
    return Trained(name, "labels", contender, time.perf_counter() - started)


def _introduce(console: Console, settings: DemoSettings, corpus: Corpus) -> None:
    console.print(
        "[bold]hf-compress demo[/bold]: does a teacher help a small model? One guest writes, another replies: is the second content?"
    )
    for example in corpus.for_test[:3]:
        console.print(f"  {example.review} | {example.reply}  [dim]->[/dim] {LABELS[example.label]}", highlight=False)
    console.print(fairness(settings), highlight=False)


def _say_where(console: Console, report: DemoReport) -> None:
    for student in STUDENTS:
        console.print(f"{student}: distilled {100 * report.gain(student):+.1f} points against labels only", highlight=False)
    console.print(f"{NARROW}: {from_disk(report.row(NARROW, 'from disk'), report.row(NARROW, 'distilled'))}", highlight=False)
    console.print(f"{report.seconds:.0f} seconds in all. Written:", highlight=False)
    for path in (*report.files.values(), *report.models.values()):
        console.print(f"  {path}", highlight=False, markup=False, soft_wrap=True)
    console.print("The folders are models: AutoModelForSequenceClassification.from_pretrained(folder) loads one.", highlight=False)


@contextmanager
def _two_threads() -> Iterator[int]:
    """Two threads, or one where torch was told to take one; then as before."""
    before = torch.get_num_threads()
    torch.set_num_threads(min(THREADS, before))
    try:
        yield torch.get_num_threads()
    finally:
        torch.set_num_threads(before)


@contextmanager
def _quiet_transformers() -> Iterator[None]:
    """Nothing of transformers, and of our own log, between our bars; then as before."""
    own = logging.getLogger("hf_compress")
    own_level = own.level
    own.setLevel(logging.WARNING)
    level = transformers_logging.get_verbosity()
    bars = transformers_logging.is_progress_bar_enabled()
    hide: Callable[[], None] = transformers_logging.disable_progress_bar
    show: Callable[[], None] = transformers_logging.enable_progress_bar
    transformers_logging.set_verbosity(logging.ERROR)
    hide()
    try:
        yield
    finally:
        own.setLevel(own_level)
        transformers_logging.set_verbosity(level)
        if bars:
            show()
