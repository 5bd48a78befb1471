"""Scripts as people have them, which know nothing of hf_compress: what `hf-compress run` runs in the tests.

Each trains a tiny BERT of 4 layers on 8 random examples and writes what happened to `--report FILE`.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

HEAD = """
import json
import sys
from dataclasses import dataclass, field

import torch
import transformers
from transformers import BertConfig, BertForSequenceClassification, HfArgumentParser, TrainingArguments


@dataclass
class ScriptArguments:
    report: str = field(metadata={"help": "Where this script writes what happened."})
    model_name_or_path: str | None = field(default=None)


def read_arguments(training_arguments):
    parser = HfArgumentParser((ScriptArguments, training_arguments))
    if len(sys.argv) == 2 and sys.argv[1].endswith(".json"):
        return parser.parse_json_file(sys.argv[1])
    return parser.parse_args_into_dataclasses()


def bert():
    torch.manual_seed(0)
    return BertForSequenceClassification(
        BertConfig(
            vocab_size=50, hidden_size=16, num_hidden_layers=4, num_attention_heads=2, intermediate_size=24,
            max_position_embeddings=40, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
        )
    )


def examples():
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(5, 50, (8, 12), generator=generator).tolist()
    return [
        {"input_ids": row[:4] + [0] * 8, "attention_mask": [1] * 4 + [0] * 8, "labels": index % 2} for index, row in enumerate(ids)
    ]


def report_and_train(script, training, trainer, whole):
    first_weights = [layer.attention.self.query.weight[0, 0].item() for layer in whole.bert.encoder.layer]
    left = trainer.model.bert.encoder.layer
    if training.do_train:
        widths = [batch["input_ids"].shape[1] for batch in trainer.get_train_dataloader()]
        kept = [first_weights.index(layer.attention.self.query.weight[0, 0].item()) + 1 for layer in left]
        trainer.train()
        trainer.save_model()
    else:
        widths, kept = [], [first_weights.index(layer.attention.self.query.weight[0, 0].item()) + 1 for layer in left]
    with open(script.report, "w") as out:
        json.dump(
            {
                "argv": sys.argv,
                "path": sys.path[0],
                "name": __name__,
                "kept": kept,
                "num_hidden_layers": trainer.model.config.num_hidden_layers,
                "trainers": [f"{cls.__module__}.{cls.__name__}" for cls in type(trainer).__mro__],
                "widths": widths,
                "frozen": not next(iter(trainer.model.bert.embeddings.parameters())).requires_grad,
                "learning_rate": training.learning_rate,
                "logged": sorted({key for entry in trainer.state.log_history for key in entry}),
            },
            out,
        )
    trainer.accelerator.end_training()  # leaves the process group, else torch may abort a process that ends before the others
"""

BODY = """
def main():
    script, training = read_arguments(TrainingArguments)
    model = bert()
    data = examples()
    trainer = {trainer}(model=model, args=training, train_dataset=data, eval_dataset=data)
    report_and_train(script, training, trainer, bert())


if __name__ == "__main__":
    main()
"""

SEQ2SEQ_BODY = BODY.replace("TrainingArguments", "transformers.Seq2SeqTrainingArguments")

# How scripts come by the Trainer -> the script.
SCRIPTS = {
    "from_transformers": "from transformers import Trainer\n" + HEAD + BODY.format(trainer="Trainer"),
    "attribute": HEAD + BODY.format(trainer="transformers.Trainer"),
    "from_module": "from transformers.trainer import Trainer\n" + HEAD + BODY.format(trainer="Trainer"),
    "subclass": "from transformers import Trainer\nclass OwnTrainer(Trainer):\n"
    "    def __init__(self, *args, **kwargs):\n        super().__init__(*args, **kwargs)\n" + HEAD + BODY.format(trainer="OwnTrainer"),
    "seq2seq": "from transformers import Seq2SeqTrainer\n" + HEAD + SEQ2SEQ_BODY.format(trainer="Seq2SeqTrainer"),
    "positional": "from transformers import Trainer\n"
    + HEAD
    + BODY.format(trainer="Trainer").replace("model=model, args=training,", "model, training,"),
}


def write_script(folder: Path, name: str = "from_transformers") -> Path:
    """Write one of the scripts into a folder of its own."""
    path = folder / "scripts" / f"{name}.py"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(SCRIPTS[name])
    return path


def training_flags(folder: Path, *more: str) -> list[str]:
    """Flags with which such a script trains for two steps on the CPU, and reports."""
    return [
        *("--report", str(folder / "report.json"), "--output_dir", str(folder / "out"), "--use_cpu", "True", "--do_train", "True"),
        *("--max_steps", "2", "--per_device_train_batch_size", "4", "--logging_steps", "1", "--disable_tqdm", "True"),
        *("--save_strategy", "no"),
        *more,
    ]


def read_report(folder: Path) -> dict[str, Any]:
    """What the script wrote."""
    report: dict[str, Any] = json.loads((folder / "report.json").read_text())
    return report
