"""What the example scripts share: their arguments, their files, and how a run goes. It knows no Trainer by name."""

from __future__ import annotations

import json
import os
import sys
from dataclasses import dataclass, field
from pathlib import Path

from datasets import Dataset
from transformers import AutoTokenizer, HfArgumentParser, set_seed


@dataclass
class ModelArguments:
    model_name_or_path: str = field(metadata={"help": "Path to a pretrained model."})


@dataclass
class DataArguments:
    train_file: str | None = field(default=None, metadata={"help": "One JSON object a line."})
    validation_file: str | None = field(default=None, metadata={"help": "The same for the evaluation."})
    max_seq_length: int = field(default=32, metadata={"help": "Longer texts are cut."})
    pad_to_max_length: bool = field(default=False, metadata={"help": "Pad every example, and not each batch."})


def parse(*kinds):
    """Arguments of the command line, or of a JSON file."""
    parser = HfArgumentParser((ModelArguments, *kinds))
    if len(sys.argv) == 2 and sys.argv[1].endswith(".json"):
        parsed = parser.parse_json_file(json_file=os.path.abspath(sys.argv[1]))
    else:
        parsed = parser.parse_args_into_dataclasses()
    set_seed(parsed[-1].seed)
    return parsed


def tokenizer_of(model_args):
    return AutoTokenizer.from_pretrained(model_args.model_name_or_path)


def read(path):
    return None if path is None else Dataset.from_list([json.loads(line) for line in Path(path).read_text().splitlines()])


def train(trainer, training_args, train_dataset):
    if not training_args.do_train:
        return
    result = trainer.train(resume_from_checkpoint=training_args.resume_from_checkpoint)
    trainer.save_model()
    metrics = {**result.metrics, "train_samples": len(train_dataset)}
    trainer.log_metrics("train", metrics)
    trainer.save_metrics("train", metrics)
    trainer.save_state()


def evaluate(trainer, training_args, eval_dataset, **more):
    if not training_args.do_eval:
        return
    metrics = {**trainer.evaluate(**more), "eval_samples": len(eval_dataset)}
    trainer.log_metrics("eval", metrics)
    trainer.save_metrics("eval", metrics)


def finish(trainer, model_args, task):
    trainer.create_model_card(finetuned_from=model_args.model_name_or_path, tasks=task)
