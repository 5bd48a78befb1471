"""TinyBERT from end to end (1909.10351): one command for all five steps, each of which also runs alone and goes on where it was stopped.

    general        student of random weights + raw text        -> general/        layers of a raw language model
    teacher        language model + task                       -> teacher/        a fine-tuned teacher
    augment        task                                        -> augmented.*     copies with words replaced
    intermediate   general/ + teacher/ + augmented             -> intermediate/   layers of the teacher, constant rate; fills cache/
    prediction     intermediate/ + cache/ + augmented          -> prediction/     predictions of the teacher, warm-up and linear decay

    python examples/tinybert/tinybert.py --task_name mrpc --text wiki.txt --vectors glove.6B.300d.txt --output_dir out

Every command that it runs is printed, to be copied. The README beside this file says how to read what they show.
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

from step import Command, Flow, FlowError, Step
from task_settings import PAPER, PREDICTION_EPOCHS, TaskSettings, settings_of

STEPS = ("general", "teacher", "augment", "intermediate", "prediction")
MEASURED = 2000  # examples whose tokens are counted for the price


def flag_parser() -> argparse.ArgumentParser:
    """The flags; those of one's own hardware go into `--training_flags`."""
    parser = argparse.ArgumentParser(description="TinyBERT from end to end.", allow_abbrev=False)
    parser.add_argument("--output_dir", required=True, help="Where everything goes.")
    parser.add_argument("--steps", default=",".join(STEPS), help="Which of them, as in intermediate,prediction; by default all.")
    data = parser.add_argument_group("the task")
    data.add_argument("--task_name", help=f"A GLUE task: {', '.join(PAPER)}. Its columns, labels and score.")
    data.add_argument("--train_file", help="Training data in place of the task's, or without a task.")
    data.add_argument("--validation_file", help="Validation data, likewise; of the same kind.")
    data.add_argument("--max_seq_length", type=int, help="By default the task's.")
    general = parser.add_argument_group("general distillation")
    general.add_argument("--general_student", help="A student that had it already, a published General TinyBERT too: the step is left out.")
    general.add_argument("--general_teacher", default="bert-base-uncased", help="A raw language model; by default bert-base-uncased.")
    general.add_argument("--text", help="Raw text, a line a text (.txt); or a data set of the hub, as NAME:CONFIGURATION.")
    general.add_argument("--num_hidden_layers", type=int, default=4, help="The student's; with what follows TinyBERT4's by default.")
    general.add_argument("--hidden_size", type=int, default=312)
    general.add_argument("--num_attention_heads", type=int, default=12, help="As many as the teacher has.")
    general.add_argument("--intermediate_size", type=int, default=1200)
    general.add_argument("--general_epochs", type=float, default=3)
    general.add_argument("--general_batch_size", type=int, default=256)
    general.add_argument("--general_learning_rate", type=float, default=5e-5)
    teacher = parser.add_argument_group("the teacher")
    teacher.add_argument("--teacher", help="A model that was fine-tuned on the task: the step is left out.")
    teacher.add_argument("--teacher_base", help="What is fine-tuned; by default the general teacher.")
    teacher.add_argument("--teacher_epochs", type=float, default=3)
    teacher.add_argument("--teacher_learning_rate", type=float, default=3e-5)
    augment = parser.add_argument_group("augmentation")
    augment.add_argument("--mlm", help="The masked LM that proposes words, or none; by default the general teacher.")
    augment.add_argument("--vectors", help="Word vectors for words of several pieces, GloVe's text format.")
    augment.add_argument("--num_copies", type=int, help="By default the task's.")
    task = parser.add_argument_group("task distillation")
    task.add_argument("--teacher_cache_dtype", default="int8", choices=("float32", "float16", "bfloat16", "int8"))
    task.add_argument("--live_teacher", action="store_true", help="Ask the teacher in every epoch, where its cache would be too large.")
    task.add_argument("--intermediate_epochs", type=float, help="By default the task's.")
    task.add_argument("--intermediate_learning_rate", type=float, default=5e-5)
    task.add_argument("--prediction_epochs", type=float, default=PREDICTION_EPOCHS)
    task.add_argument("--prediction_learning_rate", type=float, default=3e-5)
    task.add_argument("--batch_size", type=int, default=32, help="Of teacher and student on the task.")
    parser.add_argument("--faithful", default="paper", choices=("paper", "released_code"), help="Whose epochs, lengths and copies.")
    parser.add_argument("--seed", type=int, default=42)
    parser.add_argument("--training_flags", default="", help='For every training, as in "--bf16 True --dataloader_num_workers 4".')
    return parser


class TinyBert:
    """The five steps as commands.

    Args:
        flags: see `flag_parser`.
    """

    def __init__(self, flags: argparse.Namespace) -> None:
        self.flags, self.out = flags, Path(flags.output_dir)
        self.task: TaskSettings = settings_of(flags.task_name, flags.faithful)
        self.length = str(flags.max_seq_length or self.task.max_seq_length)
        self.teacher = flags.teacher or str(self.out / "teacher")
        suffix = Path(flags.train_file).suffix if flags.train_file else ".parquet"
        self.augmented = self.out / f"augmented{suffix}"
        self.cache = self.out / "cache"
        self.general = str(self.out / "general")
        self.takes_general_as_it_is = flags.general_student is not None and not _is_published(flags.general_student)
        if self.takes_general_as_it_is:
            self.general = flags.general_student

    def steps(self, names: Sequence[str]) -> list[Step]:
        """The steps of these names that have something to do, in the order of the flow.

        Raises:
            FlowError: a flag that one of them needs is missing.
        """
        makers = (self._general, self._teacher, self._augment, self._intermediate, self._prediction)
        found = [make() for name, make in zip(STEPS, makers, strict=True) if name in names]
        return [step for step in found if step is not None]

    def _general(self) -> Step | None:
        flags, start = self.flags, str(self.out / "general-start")
        leaves = [Path(self.general) / "model.safetensors", Path(self.general) / "config.json"]
        if self.takes_general_as_it_is:
            return None
        if flags.general_student is not None:
            return Step("general", [["student", flags.general_student, "-o", self.general]], leaves)
        if flags.text is None:
            raise FlowError("general distillation needs raw text: --text FILE; or a student that had it: --general_student FOLDER.")
        shape = ("num_hidden_layers", "hidden_size", "num_attention_heads", "intermediate_size")
        sizes = [part for name in shape for part in (f"--{name}", str(getattr(flags, name)))]
        name, _, configuration = flags.text.partition(":")
        text = ["--dataset_name", name, *(["--dataset_config_name", configuration] if configuration else [])]
        if Path(flags.text).suffix:
            text = ["--train_file", flags.text]
        train = [
            *("run", "mlm", "--trainer_class", "DistillTrainer", "--distill_recipe", "tinybert_general"),
            *("--teacher_model_name_or_path", flags.general_teacher, "--model_name_or_path", start),
            *(*text, "--mlm_probability", "0", "--max_seq_length", "128"),
            *self._training(self.general, flags.general_epochs, flags.general_learning_rate, flags.general_batch_size),
            *("--lr_scheduler_type", "linear", "--warmup_steps", "0.1"),
        ]
        make = ["student", flags.general_teacher, "-o", start, *sizes, "--seed", str(flags.seed)]
        return Step("general", [make, train], leaves, trains_in=Path(self.general))

    def _teacher(self) -> Step | None:
        flags = self.flags
        if flags.teacher is not None:
            return None
        train = [
            *("run", "glue", "--model_name_or_path", flags.teacher_base or flags.general_teacher, *self._data(flags.train_file)),
            *("--do_eval", *self._validation()),
            *self._training(self.teacher, flags.teacher_epochs, flags.teacher_learning_rate, flags.batch_size),
            *("--lr_scheduler_type", "linear", "--warmup_steps", "0.1"),
        ]
        return Step("teacher", [train], [Path(self.teacher) / "model.safetensors"], trains_in=Path(self.teacher))

    def _augment(self) -> Step:
        flags = self.flags
        source = flags.train_file or f"nyu-mll/glue:{flags.task_name}"
        vectors = [] if flags.vectors is None else ["--vectors", flags.vectors]
        copies = str(flags.num_copies or self.task.num_copies)
        words = [*([] if flags.mlm == "none" else ["--mlm", flags.mlm or flags.general_teacher]), *vectors]
        command = ["augment", source, "-o", str(self.augmented), *words, "--num_copies", copies, "--seed", str(flags.seed)]
        return Step("augment", [command], [self.augmented])

    def _intermediate(self) -> Step:
        flags, folder = self.flags, self.out / "intermediate"
        epochs = flags.intermediate_epochs or self.task.intermediate_epochs
        disk = [] if flags.live_teacher else ["--teacher_cache_dir", str(self.cache), "--teacher_cache_dtype", flags.teacher_cache_dtype]
        train = [
            *("run", "glue", "--trainer_class", "DistillTrainer", "--distill_recipe", "tinybert"),
            *("--distill_phases", f"intermediate={epochs:g}", "--teacher_model_name_or_path", self.teacher, *disk),
            *("--model_name_or_path", self.general, *self._data(str(self.augmented))),
            *self._training(str(folder), epochs, flags.intermediate_learning_rate, flags.batch_size),
        ]
        leaves = [folder / "model.safetensors", *([] if flags.live_teacher else [self.cache / "manifest.json"])]
        price = None if flags.live_teacher else self._price
        return Step("intermediate", [train], leaves, folder, price, builds_on=("general", "teacher", "augment"))

    def _prediction(self) -> Step:
        flags, folder = self.flags, self.out / "prediction"
        train_file = flags.train_file if self.task.prediction_on_original else str(self.augmented)
        live, disk = ["--teacher_model_name_or_path", self.teacher], ["--teacher_cache_dir", str(self.cache)]
        train = [
            *("run", "glue", "--trainer_class", "DistillTrainer", "--distill_recipe", "tinybert"),
            *("--distill_phases", f"prediction={flags.prediction_epochs:g}", *(live if flags.live_teacher else disk)),
            *("--model_name_or_path", str(self.out / "intermediate"), *self._data(train_file), "--do_eval", *self._validation()),
            *self._training(str(folder), flags.prediction_epochs, flags.prediction_learning_rate, flags.batch_size),
            *("--lr_scheduler_type", "linear", "--warmup_steps", "0.1"),
        ]
        return Step(
            "prediction", [train], [folder / "model.safetensors", folder / "eval_results.json"], folder, builds_on=("intermediate",)
        )

    def _data(self, train_file: str | None) -> Command:
        task = ["--task_name", self.flags.task_name] if self.flags.task_name else []
        lengths = ["--max_seq_length", self.length, "--pad_to_max_length", "False"]
        return [*task, *(["--train_file", train_file] if train_file else []), *lengths]

    def _validation(self) -> Command:
        return ["--validation_file", self.flags.validation_file] if self.flags.validation_file else []

    def _training(self, folder: str, epochs: float, learning_rate: float, batch_size: int) -> Command:
        """What every training says; an epoch at most is lost where one is stopped."""
        return [
            *("--do_train", "--num_train_epochs", f"{epochs:g}", "--learning_rate", f"{learning_rate:g}"),
            *("--per_device_train_batch_size", str(batch_size), "--save_strategy", "epoch", "--save_total_limit", "1"),
            *("--report_to", "none", "--seed", str(self.flags.seed), "--output_dir", folder, *shlex.split(self.flags.training_flags)),
        ]

    def _price(self) -> Command:
        """What the teacher on disk will take: counted in the augmented data, the tokens in some of it."""
        examples, tokens = count_examples(self.augmented, self.teacher, int(self.length))
        return [
            *("cache", "estimate", "--teacher_model_name_or_path", self.teacher, "--model_name_or_path", self.general),
            *("--distill_recipe", "tinybert", "--teacher_cache_dtype", self.flags.teacher_cache_dtype),
            *("--teacher_cache_dir", str(self.cache), "--num_examples", str(examples), "--tokens_per_example", f"{tokens:.1f}"),
        ]


def count_examples(path: Path, tokenizer_name: str, max_seq_length: int) -> tuple[int, float]:
    """How many examples a file holds, and the mean number of tokens of some of them.

    Raises:
        FlowError: there is no such file.
    """
    if not path.is_file():
        raise FlowError(f"There is no augmented data in {path}: run the step augment first.")
    from transformers import AutoTokenizer  # the flow itself waits for neither torch nor transformers

    from hf_compress.augmentation.tables import choose_text_columns, read_table

    table = read_table(str(path))
    some = table.select(range(0, len(table), max(1, len(table) // MEASURED)))
    columns = choose_text_columns(some, None, str(path))
    encoded = AutoTokenizer.from_pretrained(tokenizer_name)(
        *(list(some[column]) for column in columns), truncation=True, max_length=max_seq_length
    )
    return len(table), sum(map(len, encoded["input_ids"])) / len(some)


def _is_published(student: str) -> bool:
    """Whether a student has the layout in which TinyBERT's authors published theirs."""
    from hf_compress.students.tinybert import is_general_tinybert

    return is_general_tinybert(student)


def chosen_steps(flags: argparse.Namespace) -> list[str]:
    """The names of the steps to run.

    Raises:
        FlowError: one that is not known, or no data.
    """
    names = [name.strip() for name in flags.steps.split(",") if name.strip()]
    unknown = [name for name in names if name not in STEPS]
    if unknown or not names:
        raise FlowError(f"--steps {flags.steps}: there is no step {unknown[0] if unknown else 'named'}. Steps: {', '.join(STEPS)}.")
    if set(names) != {"general"} and flags.task_name is None and (flags.train_file is None or flags.validation_file is None):
        raise FlowError("Say which task: --task_name, or --train_file and --validation_file.")
    if flags.task_name is not None and flags.task_name not in PAPER:
        raise FlowError(f"--task_name {flags.task_name} is no GLUE task. The tasks are: {', '.join(PAPER)}.")
    return names


def say_scores(out: Path) -> None:
    """The student's score beside the teacher's, where both are known."""
    for name in ("teacher", "prediction"):
        path = out / name / "eval_results.json"
        if path.is_file():
            scores = {key: value for key, value in json.loads(path.read_text()).items() if key.startswith("eval_")}
            kept = [f"{key.removeprefix('eval_')} {value:.4f}" for key, value in scores.items() if "_per_" not in key and "time" not in key]
            print(
                f"{'student' if name == 'prediction' else name:<8} {', '.join(each for each in kept if 'samples' not in each)}", flush=True
            )


def main(argv: Sequence[str] | None = None) -> int:
    """Run the flow; returns the exit code: 0, 1 where a step failed, 130 after Ctrl-C."""
    flags = flag_parser().parse_args(argv)
    try:
        steps = TinyBert(flags).steps(chosen_steps(flags))
        Path(flags.output_dir).mkdir(parents=True, exist_ok=True)
        flow = Flow(Path(flags.output_dir) / "steps")
        for step in steps:
            flow.run(step)
    except FlowError as error:
        print(f"tinybert: error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\ntinybert: stopped; the same command goes on from here", file=sys.stderr)
        return 130
    print()
    say_scores(Path(flags.output_dir))
    return 0


if __name__ == "__main__":
    sys.exit(main())
