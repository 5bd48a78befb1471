"""Fine-tune or distil on a GLUE task: this project's run_glue script, having adopted hf_compress itself.

What one's own script changes is two lines: `DistillTrainingArguments` in place of `TrainingArguments` where the flags are parsed, and
`DistillTrainer` in place of `Trainer`. Here the trainer is chosen by `--trainer_class`:

    python examples/run_glue.py --task_name mrpc --model_name_or_path my-student --output_dir out --do_train --do_eval \\
        --trainer_class DistillTrainer --teacher_model_name_or_path my-mrpc-bert

    python examples/run_glue.py --task_name mrpc --model_name_or_path bert-base-uncased --output_dir out --do_train --do_eval \\
        --layer_drop_strategy symmetric --num_layers_to_drop 4
"""

from __future__ import annotations

from typing import cast

from transformers import Trainer, TrainingArguments

from hf_compress import DistillTrainingArguments
from hf_compress.bound_trainer import trainer_of
from hf_compress.scripts.run_glue import main


def chosen_trainer(arguments: TrainingArguments) -> type[Trainer]:
    """The trainer that the flags ask for, with layer dropping where they ask for that."""
    return trainer_of(cast(DistillTrainingArguments, arguments)).trainer_class


if __name__ == "__main__":
    main(DistillTrainingArguments, chosen_trainer)
