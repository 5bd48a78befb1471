"""Fine-tune a sequence classifier on a GLUE task or on one's own CSV, JSON or parquet files, or on a task with files for its splits.

A script like any other that is built on `transformers.Trainer`: it knows nothing of compression. `hf-compress run glue ...` runs it,
and adds layer dropping and distillation from outside; `examples/run_glue.py` is the same script with the two-line change that adopts the
plugin from inside.

    data -> tokenizer -> model -> Trainer -> train, evaluate, predict
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import evaluate
import numpy as np
import transformers
from datasets import ClassLabel, Dataset, DatasetDict, load_dataset
from sklearn.metrics import accuracy_score, mean_squared_error
from transformers import (
    AutoConfig,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DataCollatorWithPadding,
    EvalPrediction,
    HfArgumentParser,
    PreTrainedTokenizerBase,
    Trainer,
    TrainingArguments,
    set_seed,
)

logger = logging.getLogger(__name__)

# GLUE task -> the columns that hold its sentence or its pair of sentences.
TEXT_COLUMNS: dict[str, tuple[str, ...]] = {
    "cola": ("sentence",),
    "mnli": ("premise", "hypothesis"),
    "mrpc": ("sentence1", "sentence2"),
    "qnli": ("question", "sentence"),
    "qqp": ("question1", "question2"),
    "rte": ("sentence1", "sentence2"),
    "sst2": ("sentence",),
    "stsb": ("sentence1", "sentence2"),
    "wnli": ("sentence1", "sentence2"),
}


@dataclass
class DataArguments:
    """What the model learns from."""

    task_name: str | None = field(default=None, metadata={"help": "A GLUE task: " + ", ".join(TEXT_COLUMNS)})
    train_file: str | None = field(
        default=None, metadata={"help": "Training data without a task, or in place of the task's own (.csv, .json or .parquet)."}
    )
    validation_file: str | None = field(default=None, metadata={"help": "Validation data, of the same kind."})
    test_file: str | None = field(default=None, metadata={"help": "Test data, of the same kind."})
    max_seq_length: int = field(default=128, metadata={"help": "Longer inputs are cut to this many tokens."})
    pad_to_max_length: bool = field(
        default=True, metadata={"help": "Pad every example to max_seq_length; False pads each batch to its longest example."}
    )
    max_train_samples: int | None = field(default=None, metadata={"help": "Train on the first so many examples only."})
    max_eval_samples: int | None = field(default=None, metadata={"help": "Evaluate on the first so many examples only."})
    max_predict_samples: int | None = field(default=None, metadata={"help": "Predict the first so many examples only."})
    overwrite_cache: bool = field(default=False, metadata={"help": "Tokenize again, even where the result is cached."})

    def __post_init__(self) -> None:
        if self.task_name is not None:
            self.task_name = self.task_name.lower()
            if self.task_name not in TEXT_COLUMNS:
                raise ValueError(f"--task_name {self.task_name} is no GLUE task. The tasks are: {', '.join(TEXT_COLUMNS)}.")
        elif self.train_file is None and self.validation_file is None and self.test_file is None:
            raise ValueError("Say what to learn from: --task_name with a GLUE task, or --train_file and --validation_file.")


@dataclass
class ModelArguments:
    """Which model is fine-tuned."""

    model_name_or_path: str = field(metadata={"help": "A folder, or the name of a model on the Hub."})
    config_name: str | None = field(default=None, metadata={"help": "Another configuration than the model's."})
    tokenizer_name: str | None = field(default=None, metadata={"help": "Another tokenizer than the model's."})
    cache_dir: str | None = field(default=None, metadata={"help": "Where downloads are kept."})
    model_revision: str = field(default="main", metadata={"help": "Branch, tag or commit of the model."})
    ignore_mismatched_sizes: bool = field(default=False, metadata={"help": "Load a model whose head has another size."})


# For .csv: an empty cell alone is empty; "null", "NA" and "None" are texts as others are.
WORDS_STAY: dict[str, Any] = {"keep_default_na": False, "na_values": [""]}
NAMED = "label_name"  # the labels as the file has them, until they are ids
FILE_FLAGS = {"train": "--train_file", "validation": "--validation_file", "test": "--test_file"}


def load_splits(arguments: DataArguments, cache_dir: str | None) -> DatasetDict:
    """Load the task, or the files, as splits named train, validation and test (mnli: validation_matched and so on)."""
    task = None if arguments.task_name is None else load_dataset("nyu-mll/glue", arguments.task_name, cache_dir=cache_dir)
    named = {"train": arguments.train_file, "validation": arguments.validation_file, "test": arguments.test_file}
    files = {split: path for split, path in named.items() if path is not None}
    if task is not None and not files:
        return task
    kinds = {Path(path).suffix.lstrip(".") for path in files.values()}
    if len(kinds) != 1:
        raise ValueError(f"The files must be of one kind, not {', '.join(sorted(kinds))}.")
    kind = kinds.pop().replace("jsonl", "json")
    if kind not in ("csv", "json", "parquet"):
        raise ValueError(f"The files must end in .csv, .json or .parquet, not .{kind}.")
    missing = [f"{FILE_FLAGS[split]} {path}" for split, path in files.items() if not Path(path).is_file()]
    if missing:
        raise ValueError(f"There is no such file: {', '.join(missing)}.")
    for split, path in files.items():
        if kind == "csv" and not has_rows(Path(path)):
            raise ValueError(f"{FILE_FLAGS[split]} {path} holds no examples: there is nothing below its header.")
    splits = load_dataset(kind, data_files=files, cache_dir=cache_dir, **(WORDS_STAY if kind == "csv" else {}))
    check_files(splits, files, arguments.task_name)
    return splits if task is None else in_place(task, splits, files)


def in_place(task: DatasetDict, splits: DatasetDict, files: dict[str, str]) -> DatasetDict:
    """The task's splits, with those of the files in their place: the labels, by name or by number, and the score stay the task's.

    Raises:
        ValueError: labels that the task does not have.
    """
    feature = next(iter(task.values())).features["label"]
    whole = DatasetDict(task)
    for split, dataset in splits.items():
        for name in [name for name in task if name == split or name.startswith(f"{split}_")]:  # mnli has two of some
            del whole[name]
        if "label" in dataset.column_names:
            names = getattr(feature, "names", None)
            try:
                dataset = dataset.cast_column("label", feature)
                unknown = set(dataset["label"]) - set(range(len(names))) if names and split != "test" else set()
            except (ValueError, KeyError, TypeError) as error:
                unknown = {error}
            if unknown:
                known = ", ".join(names or ["numbers"])
                raise ValueError(f"{FILE_FLAGS[split]} {files[split]} has labels that the task has not ({known}): {unknown.pop()}.")
        whole[split] = dataset
    return whole


def has_rows(path: Path) -> bool:
    """Whether anything stands below the header of a CSV file."""
    with path.open(encoding="utf-8") as lines:
        return sum(1 for _ in islice((line for line in lines if line.strip()), 2)) == 2


def check_files(splits: DatasetDict, files: dict[str, str], task_name: str | None = None) -> None:
    """Refuse files without rows, without labels, or with empty cells, before anything else is loaded.

    Raises:
        ValueError: naming the flag, the file and the column.
    """
    columns = text_columns(task_name, splits)
    for split, dataset in splits.items():
        named = f"{FILE_FLAGS[split]} {files[split]}"
        needed = (*columns, *(["label"] if split != "test" else []))
        missing = [column for column in needed if column not in dataset.column_names]
        if missing or not columns:
            wanted = "one or two columns of text" if task_name is None else "the task's columns " + " and ".join(columns)
            raise ValueError(
                f"{named} has no column '{missing[0] if missing else 'sentence'}'; its columns are: {', '.join(dataset.column_names)}. "
                f"Needed are {wanted}, and 'label'."
            )
        for column in needed:
            empty = [row for row, value in enumerate(dataset[column], start=1) if value is None or value == "" or value != value]
            if empty:
                raise ValueError(
                    f"{named}: the column '{column}' is empty in example {empty[0]}"
                    + (f" and {len(empty) - 1} more" if empty[1:] else "")
                    + "."
                )
            if column != "label" and not isinstance(dataset[0][column], str):
                raise ValueError(f"{named}: the column '{column}' holds {dataset[0][column]!r}, which is no text.")


def check_wanted(arguments: DataArguments, training: TrainingArguments) -> None:
    """Refuse to train, evaluate or predict on files that nobody named.

    Raises:
        ValueError: naming the flag that is missing.
    """
    if arguments.task_name is not None:
        return
    for wanted, name in (("do_train", "train_file"), ("do_eval", "validation_file"), ("do_predict", "test_file")):
        if getattr(training, wanted) and getattr(arguments, name) is None:
            also = " and --eval_strategy, which turns it on," if wanted == "do_eval" and training.eval_strategy != "no" else ""
            raise ValueError(f"--{wanted} needs data, and no --{name} is given. Add --{name} FILE, or leave --{wanted}{also} out.")


def check_labels(splits: DatasetDict, label_to_id: dict[str, int]) -> None:
    """Refuse labels that the training data does not have.

    Raises:
        ValueError: naming the file and the label.
    """
    for split, dataset in splits.items():
        if "label" in dataset.column_names and split in ("train", "validation"):
            unknown = sorted({str(label) for label in dataset.unique("label")} - label_to_id.keys())
            if unknown:
                raise ValueError(
                    f"{FILE_FLAGS[split]} has the label '{unknown[0]}', which the training data has not: {', '.join(label_to_id)}."
                )


def label_names(splits: DatasetDict) -> list[str] | None:
    """The labels in the order of their ids; None where the label is a number to be regressed."""
    split = splits["train"] if "train" in splits else next(iter(splits.values()))
    if "label" not in split.features:
        raise ValueError("No file has labels, so how many there are is not known. Add the --train_file that the model was trained on.")
    feature = split.features["label"]
    if isinstance(feature, ClassLabel):
        return list(feature.names)
    if str(feature.dtype).startswith("float"):
        return None
    return [str(label) for label in sorted(split.unique("label"))]


def text_columns(task_name: str | None, splits: DatasetDict) -> tuple[str, ...]:
    """The columns to tokenize: the task's, or the first one or two that are not the label."""
    if task_name is not None:
        return TEXT_COLUMNS[task_name]
    columns = [name for name in next(iter(splits.values())).column_names if name not in ("label", "idx", "id")]
    return ("sentence1", "sentence2") if {"sentence1", "sentence2"} <= set(columns) else tuple(columns[:2])


def tokenized(
    splits: DatasetDict, tokenizer: PreTrainedTokenizerBase, arguments: DataArguments, label_to_id: dict[str, int] | None
) -> DatasetDict:
    """Add `input_ids`, `attention_mask` and the rest, and turn label names into ids."""
    columns = text_columns(arguments.task_name, splits)
    padding: bool | str = "max_length" if arguments.pad_to_max_length else False
    max_length = min(arguments.max_seq_length, tokenizer.model_max_length)
    feature = next(iter(splits.values())).features.get("label")
    names_to_ids = None if isinstance(feature, ClassLabel) else label_to_id

    def encode(examples: dict[str, Any]) -> dict[str, Any]:
        encoded = dict(tokenizer(*(examples[column] for column in columns), padding=padding, max_length=max_length, truncation=True))
        if names_to_ids is not None and NAMED in examples:
            encoded["label"] = [names_to_ids.get(str(label), -100) for label in examples[NAMED]]  # a test file may have placeholders
        return encoded

    encoded_splits = DatasetDict()
    for name, split in splits.items():
        # A new column for the ids: under its own name the old one would turn them into text again.
        named = names_to_ids is not None and "label" in split.column_names
        encoded_splits[name] = (split.rename_column("label", NAMED) if named else split).map(
            encode,
            batched=True,
            remove_columns=[NAMED] if named else None,
            load_from_cache_file=not arguments.overwrite_cache,
            desc="Tokenizing",
        )
    return encoded_splits


def metric_function(task_name: str | None, is_regression: bool) -> Callable[[EvalPrediction], dict[str, float]]:
    """The task's own metric; accuracy, or the mean squared error, for files (these two need no download)."""
    metric = evaluate.load("glue", task_name) if task_name is not None else None

    def compute(prediction: EvalPrediction) -> dict[str, float]:
        logits = prediction.predictions[0] if isinstance(prediction.predictions, tuple) else prediction.predictions
        answers = np.squeeze(logits) if is_regression else np.argmax(logits, axis=1)
        if metric is not None:
            scores = dict(metric.compute(predictions=answers, references=prediction.label_ids))
        elif is_regression:
            scores = {"mse": float(mean_squared_error(prediction.label_ids, answers))}
        else:
            scores = {"accuracy": float(accuracy_score(prediction.label_ids, answers))}
        if len(scores) > 1:
            scores["combined_score"] = float(np.mean(list(scores.values())))
        return scores

    return compute


def first(dataset: Dataset, limit: int | None) -> Dataset:
    """The first `limit` examples."""
    return dataset if limit is None else dataset.select(range(min(limit, len(dataset))))


def split_named(splits: DatasetDict, name: str) -> dict[str, Dataset]:
    """The split of that name; MNLI has two of them, matched and mismatched."""
    found = {key: splits[key] for key in (name, f"{name}_matched", f"{name}_mismatched") if key in splits}
    if not found:
        raise ValueError(f"The data has no {name} split; it has {', '.join(splits)}.")
    return found


def write_predictions(path: Path, predictions: np.ndarray, names: list[str] | None) -> None:
    """Write one line an example: its index and its label, or its number."""
    with path.open("w", encoding="utf-8") as out:
        out.write("index\tprediction\n")
        for index, row in enumerate(predictions):
            out.write(f"{index}\t{float(np.squeeze(row)):.3f}\n" if names is None else f"{index}\t{names[int(np.argmax(row))]}\n")


def main(
    arguments_class: type[TrainingArguments] = TrainingArguments,
    trainer_class: Callable[[TrainingArguments], type[Trainer]] | None = None,
) -> None:
    """Run the script on `sys.argv`.

    Args:
        arguments_class: the class that holds the training flags.
        trainer_class: chooses the trainer once the flags are read; by default `transformers.Trainer`.
    """
    classes: list[Any] = [ModelArguments, DataArguments, arguments_class]
    parser = HfArgumentParser(classes)
    model_arguments, data_arguments, training_arguments = parser.parse_args_into_dataclasses()
    logging.basicConfig(format="%(asctime)s %(levelname)s %(name)s: %(message)s", level=training_arguments.get_process_log_level())
    transformers.utils.logging.set_verbosity(training_arguments.get_process_log_level())
    set_seed(training_arguments.seed)

    check_wanted(data_arguments, training_arguments)
    splits = load_splits(data_arguments, model_arguments.cache_dir)
    names = None if data_arguments.task_name == "stsb" else label_names(splits)
    source = {"cache_dir": model_arguments.cache_dir, "revision": model_arguments.model_revision}
    config = AutoConfig.from_pretrained(
        model_arguments.config_name or model_arguments.model_name_or_path,
        num_labels=1 if names is None else len(names),
        finetuning_task=data_arguments.task_name,
        **source,
    )
    label_to_id = None
    if names is not None:
        label_to_id = {name: index for index, name in enumerate(names)}
        if data_arguments.task_name is None:
            check_labels(splits, label_to_id)
        config.label2id, config.id2label = label_to_id, dict(enumerate(names))
    tokenizer = AutoTokenizer.from_pretrained(model_arguments.tokenizer_name or model_arguments.model_name_or_path, **source)
    model = AutoModelForSequenceClassification.from_pretrained(
        model_arguments.model_name_or_path,
        config=config,
        ignore_mismatched_sizes=model_arguments.ignore_mismatched_sizes,
        **source,
    )
    with training_arguments.main_process_first(desc="tokenizing"):
        splits = tokenized(splits, tokenizer, data_arguments, label_to_id)

    train_dataset = None
    if training_arguments.do_train:
        train_dataset = first(split_named(splits, "train")["train"], data_arguments.max_train_samples)
    eval_datasets: dict[str, Dataset] = {}
    if training_arguments.do_eval:
        found = split_named(splits, "validation")
        eval_datasets = {name: first(dataset, data_arguments.max_eval_samples) for name, dataset in found.items()}
    trainer = (Trainer if trainer_class is None else trainer_class(training_arguments))(
        model=model,
        args=training_arguments,
        train_dataset=train_dataset,
        eval_dataset=next(iter(eval_datasets.values()), None),
        compute_metrics=metric_function(data_arguments.task_name, names is None),
        processing_class=tokenizer,
        data_collator=DataCollatorWithPadding(tokenizer, pad_to_multiple_of=8 if training_arguments.fp16 else None),
    )

    if train_dataset is not None:
        resumed = training_arguments.resume_from_checkpoint
        result = trainer.train(resume_from_checkpoint=True if str(resumed).lower() == "true" else resumed)
        trainer.save_model()  # the tokenizer too
        trainer.log_metrics("train", {**result.metrics, "train_samples": len(train_dataset)})
        trainer.save_metrics("train", {**result.metrics, "train_samples": len(train_dataset)})
        trainer.save_state()

    scores: dict[str, float] = {}
    for name, dataset in eval_datasets.items():
        metrics = {**trainer.evaluate(eval_dataset=dataset), "eval_samples": len(dataset)}
        scores.update({f"{key}_mm": value for key, value in metrics.items()} if name.endswith("_mismatched") else metrics)
    if scores:
        trainer.log_metrics("eval", scores)
        trainer.save_metrics("eval", scores)

    if training_arguments.do_predict:
        for name, dataset in split_named(splits, "test").items():
            unlabelled = first(dataset, data_arguments.max_predict_samples)
            if "label" in unlabelled.column_names:
                unlabelled = unlabelled.remove_columns("label")  # a test split's labels are placeholders
            logits: Any = trainer.predict(unlabelled, metric_key_prefix="predict").predictions
            if trainer.is_world_process_zero():
                path = Path(training_arguments.output_dir) / f"predict_results_{data_arguments.task_name or name}.txt"
                write_predictions(path, logits, names)

    card: dict[str, Any] = {"finetuned_from": model_arguments.model_name_or_path, "tasks": "text-classification"}
    if data_arguments.task_name is not None:
        name = data_arguments.task_name
        card |= {"language": "en", "dataset_tags": "nyu-mll/glue", "dataset_args": name, "dataset": f"GLUE {name.upper()}"}
    trainer.create_model_card(**card)


if __name__ == "__main__":
    main()
