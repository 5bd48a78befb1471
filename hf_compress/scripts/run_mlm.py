"""Train a language model on raw text: by masking words, or, with `--mlm_probability 0`, by whatever a Trainer compares by itself.

A script like any other that is built on `transformers.Trainer`: it knows nothing of compression. `hf-compress run mlm ...` runs it. Its
flags are named as in transformers' own run_mlm.py.

    text -> tokenizer -> lines, or blocks of max_seq_length -> model -> Trainer -> train, evaluate

With `--mlm_probability 0` no word is masked and there are no labels, as in TinyBERT's general distillation: the model is loaded without a
head, which nobody would read, and there is nothing to evaluate.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import Any

import transformers
from datasets import Dataset, DatasetDict, load_dataset
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForMaskedLM,
    AutoTokenizer,
    DataCollatorForLanguageModeling,
    DataCollatorWithPadding,
    HfArgumentParser,
    PreTrainedConfig,
    PreTrainedTokenizerBase,
    Trainer,
    TrainingArguments,
    set_seed,
)

logger = logging.getLogger(__name__)

# The end of a file's name -> what `load_dataset` calls its kind.
KINDS = {"txt": "text", "csv": "csv", "json": "json", "jsonl": "json", "parquet": "parquet"}
LONGEST = 1024


@dataclass
class DataArguments:
    """What the model learns from."""

    dataset_name: str | None = field(default=None, metadata={"help": "A data set with text, of the Hub or a folder."})
    dataset_config_name: str | None = field(default=None, metadata={"help": "Which configuration of it."})
    train_file: str | None = field(default=None, metadata={"help": f"Training text instead (.{', .'.join(KINDS)})."})
    validation_file: str | None = field(default=None, metadata={"help": "Validation text, of the same kind."})
    validation_split_percentage: int = field(
        default=5, metadata={"help": "Without validation text: the share of the training text, in percent, that is evaluated on instead."}
    )
    max_seq_length: int | None = field(
        default=None, metadata={"help": "Tokens an example, special ones among them; by default as many as the model takes."}
    )
    mlm_probability: float = field(
        default=0.15,
        metadata={"help": "The share of tokens that are masked. 0 masks none: no labels, and no head that would predict them."},
    )
    line_by_line: bool = field(
        default=False, metadata={"help": "Each line is an example; otherwise text is cut into blocks of max_seq_length."}
    )
    pad_to_max_length: bool = field(
        default=False, metadata={"help": "Pad every example to max_seq_length; otherwise each batch to its longest example."}
    )
    preprocessing_num_workers: int | None = field(default=None, metadata={"help": "Processes that tokenize."})
    max_train_samples: int | None = field(default=None, metadata={"help": "Train on the first so many examples only."})
    max_eval_samples: int | None = field(default=None, metadata={"help": "Evaluate on the first so many examples only."})
    overwrite_cache: bool = field(default=False, metadata={"help": "Tokenize again, even where the result is cached."})

    def __post_init__(self) -> None:
        if self.dataset_name is None and self.train_file is None and self.validation_file is None:
            raise ValueError("Say what to learn from: --train_file with text, or --dataset_name.")
        if not 0 <= self.mlm_probability < 1:
            raise ValueError(f"--mlm_probability is {self.mlm_probability:g}; expected a share of the tokens, from 0 to below 1.")
        if not 0 < self.validation_split_percentage < 100:
            raise ValueError(f"--validation_split_percentage is {self.validation_split_percentage}; expected 1 to 99.")


@dataclass
class ModelArguments:
    """Which model is trained on."""

    model_name_or_path: str = field(metadata={"help": "A folder, or the name of a model on the Hub."})
    config_name: str | None = field(default=None, metadata={"help": "Another configuration than the model's."})
    tokenizer_name: str | None = field(default=None, metadata={"help": "Another tokenizer than the model's."})
    cache_dir: str | None = field(default=None, metadata={"help": "Where downloads are kept."})
    model_revision: str = field(default="main", metadata={"help": "Branch, tag or commit of the model."})


def check_wanted(arguments: DataArguments, training: TrainingArguments) -> None:
    """Refuse what would end in nothing or in NaN, before anything is loaded.

    Raises:
        ValueError: naming the flag.
    """
    if arguments.mlm_probability == 0 and training.do_eval:
        also = " and --eval_strategy, which turns it on," if training.eval_strategy != "no" else ""
        raise ValueError(
            f"--mlm_probability 0 masks no word, so there is no perplexity to evaluate. Leave --do_eval{also} out, and watch the losses of "
            "the training."
        )
    if training.do_train and arguments.dataset_name is None and arguments.train_file is None:
        raise ValueError("--do_train needs text, and no --train_file is given.")


def load_text(arguments: DataArguments, cache_dir: str | None, *, with_validation: bool) -> DatasetDict:
    """The text as splits train and validation; validation is a share of train where there is none, and left out if not asked for.

    Raises:
        ValueError: a file that is not there, of another kind, or without text.
    """
    if arguments.dataset_name is not None:
        splits = load_dataset(arguments.dataset_name, arguments.dataset_config_name, cache_dir=cache_dir)
    else:
        named = {"train": arguments.train_file, "validation": arguments.validation_file}
        files = {split: path for split, path in named.items() if path is not None}
        for split, path in files.items():
            if not Path(path).is_file():
                raise ValueError(f"There is no such file: --{split}_file {path}.")
        endings = {Path(path).suffix.lstrip(".") for path in files.values()}
        if len(endings) != 1 or not endings <= KINDS.keys():
            raise ValueError(f"The files must be of one kind, {', '.join(KINDS)}, not {', '.join(sorted(endings))}.")
        kind = KINDS[endings.pop()]
        # Of a .csv, an empty cell alone is empty; "null", "NA" and "None" are texts as others are.
        words_stay: dict[str, Any] = {"keep_default_na": False, "na_values": [""]} if kind == "csv" else {}
        splits = load_dataset(kind, data_files=files, cache_dir=cache_dir, **words_stay)
    if with_validation and "validation" not in splits:
        count = len(splits["train"])
        held_back = math.ceil(count * arguments.validation_split_percentage / 100)
        whole = splits["train"]
        splits["validation"], splits["train"] = whole.select(range(held_back)), whole.select(range(held_back, count))
    wanted = ("train", "validation") if with_validation else ("train",)
    found = DatasetDict({name: splits[name] for name in wanted if name in splits})
    for name, split in found.items():
        column = text_column(split)
        if not any(isinstance(text, str) and text.strip() for text in split[column]):
            raise ValueError(f"The {name} split holds no text in its column '{column}'.")
    return found


def text_column(split: Dataset) -> str:
    """The column "text", or the first."""
    return "text" if "text" in split.column_names else str(split.column_names[0])


def longest_example(arguments: DataArguments, tokenizer: PreTrainedTokenizerBase, config: PreTrainedConfig) -> int:
    """Tokens an example may have: what was asked for, as far as tokenizer and model allow it."""
    limits = [tokenizer.model_max_length, getattr(config, "max_position_embeddings", None) or LONGEST]
    return int(min(arguments.max_seq_length or LONGEST, *limits))


def added_around(tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], list[int]]:
    """The special tokens that the tokenizer puts before and after a text."""
    whole, inside = (list(tokenizer("a", add_special_tokens=added)["input_ids"]) for added in (True, False))
    before = next(place for place in range(len(whole)) if whole[place : place + len(inside)] == inside)
    return whole[:before], whole[before + len(inside) :]


def tokenized(splits: DatasetDict, tokenizer: PreTrainedTokenizerBase, arguments: DataArguments, length: int) -> DatasetDict:
    """`input_ids` and `attention_mask`, a line or a block of text each.

    Blocks are cut from the text of up to a thousand lines, joined; each has the special tokens that one text has, and the last of them may
    be shorter.
    """
    padding: bool | str = "max_length" if arguments.pad_to_max_length else False

    def texts(examples: dict[str, list[Any]], column: str) -> list[str]:
        return [text for text in examples[column] if isinstance(text, str) and text.strip()]

    def lines(examples: dict[str, list[Any]], column: str) -> dict[str, Any]:
        found = texts(examples, column)
        return (
            dict(tokenizer(found, truncation=True, max_length=length, padding=padding))
            if found
            else {"input_ids": [], "attention_mask": []}
        )

    before, after = added_around(tokenizer)
    room = length - len(before) - len(after)
    if room < 1:
        raise ValueError(f"--max_seq_length {length} has no room for text beside {len(before) + len(after)} special tokens.")

    def blocks(examples: dict[str, list[Any]], column: str) -> dict[str, Any]:
        found = texts(examples, column)
        ids = list(chain(*tokenizer(found, add_special_tokens=False, verbose=False)["input_ids"])) if found else []
        cut = [[*before, *ids[start : start + room], *after] for start in range(0, len(ids), room)]
        whole = {"input_ids": cut, "attention_mask": [[1] * len(block) for block in cut]}
        return dict(tokenizer.pad(whole, padding="max_length", max_length=length)) if arguments.pad_to_max_length and cut else whole

    made = DatasetDict()
    for name, split in splits.items():
        made[name] = split.map(
            lines if arguments.line_by_line else blocks,
            batched=True,
            fn_kwargs={"column": text_column(split)},
            remove_columns=split.column_names,
            num_proc=arguments.preprocessing_num_workers,
            load_from_cache_file=not arguments.overwrite_cache,
            desc="Tokenizing",
        )
    return made


def first(dataset: Dataset, limit: int | None) -> Dataset:
    """The first `limit` examples."""
    return dataset if limit is None else dataset.select(range(min(limit, len(dataset))))


def perplexity(loss: float) -> float:
    """The exponential of a mean loss a token."""
    return math.exp(loss) if loss < 700 else float("inf")


def refuse_without_a_loss(trainer: Trainer) -> None:
    """With nothing masked, transformers' own loss has nothing to be computed from.

    Raises:
        ValueError: the trainer has no loss of its own.
    """
    if type(trainer).compute_loss.__module__ == "transformers.trainer":
        raise ValueError(
            "--mlm_probability 0 masks no word, so there is nothing to learn from. Give a share above 0, or run this with a Trainer that "
            "has a loss of its own, as in `hf-compress run mlm --trainer_class DistillTrainer --distill_recipe tinybert_general ...`."
        )


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
    model_arguments, data_arguments, training_arguments = HfArgumentParser(classes).parse_args_into_dataclasses()
    logging.basicConfig(format="%(asctime)s %(levelname)s %(name)s: %(message)s", level=training_arguments.get_process_log_level())
    transformers.utils.logging.set_verbosity(training_arguments.get_process_log_level())
    set_seed(training_arguments.seed)

    check_wanted(data_arguments, training_arguments)
    splits = load_text(data_arguments, model_arguments.cache_dir, with_validation=training_arguments.do_eval)
    source = {"cache_dir": model_arguments.cache_dir, "revision": model_arguments.model_revision}
    config = AutoConfig.from_pretrained(model_arguments.config_name or model_arguments.model_name_or_path, **source)
    tokenizer = AutoTokenizer.from_pretrained(model_arguments.tokenizer_name or model_arguments.model_name_or_path, **source)
    masks = data_arguments.mlm_probability > 0
    model = (AutoModelForMaskedLM if masks else AutoModel).from_pretrained(model_arguments.model_name_or_path, config=config, **source)
    with training_arguments.main_process_first(desc="tokenizing"):
        splits = tokenized(splits, tokenizer, data_arguments, longest_example(data_arguments, tokenizer, config))

    multiple = 8 if training_arguments.fp16 else None
    collator = (
        DataCollatorForLanguageModeling(tokenizer, mlm_probability=data_arguments.mlm_probability, pad_to_multiple_of=multiple)
        if masks
        else DataCollatorWithPadding(tokenizer, pad_to_multiple_of=multiple)
    )
    train_dataset = first(splits["train"], data_arguments.max_train_samples) if training_arguments.do_train else None
    eval_dataset = first(splits["validation"], data_arguments.max_eval_samples) if training_arguments.do_eval else None
    trainer = (Trainer if trainer_class is None else trainer_class(training_arguments))(
        model=model,
        args=training_arguments,
        train_dataset=train_dataset,
        eval_dataset=eval_dataset,
        processing_class=tokenizer,
        data_collator=collator,
    )
    if not masks:
        refuse_without_a_loss(trainer)

    if train_dataset is not None:
        result = trainer.train(resume_from_checkpoint=training_arguments.resume_from_checkpoint)
        trainer.save_model()  # the tokenizer too
        metrics = {**result.metrics, "train_samples": len(train_dataset)}
        trainer.log_metrics("train", metrics)
        trainer.save_metrics("train", metrics)
        trainer.save_state()
    if eval_dataset is not None:
        metrics = {**trainer.evaluate(), "eval_samples": len(eval_dataset)}
        metrics["perplexity"] = perplexity(metrics["eval_loss"])
        trainer.log_metrics("eval", metrics)
        trainer.save_metrics("eval", metrics)
    trainer.create_model_card(finetuned_from=model_arguments.model_name_or_path, tasks="fill-mask")


if __name__ == "__main__":
    main()
