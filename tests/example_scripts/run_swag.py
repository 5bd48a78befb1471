"""Multiple choice on one's own files: `sent1`, `ending0` to `ending3`, `label`."""

from itertools import chain

import numpy as np
from example_parts import DataArguments, evaluate, finish, parse, read, tokenizer_of, train
from transformers import AutoModelForMultipleChoice, DataCollatorForMultipleChoice, Trainer, TrainingArguments, default_data_collator


def main():
    model_args, data_args, training_args = parse(DataArguments, TrainingArguments)
    tokenizer = tokenizer_of(model_args)
    model = AutoModelForMultipleChoice.from_pretrained(model_args.model_name_or_path)
    ending_names = [f"ending{number}" for number in range(4)]

    def preprocess_function(examples):
        first = list(chain(*([context] * 4 for context in examples["sent1"])))
        second = list(chain(*zip(*(examples[name] for name in ending_names), strict=True)))
        padding = "max_length" if data_args.pad_to_max_length else False
        tokenized = tokenizer(first, second, truncation=True, max_length=data_args.max_seq_length, padding=padding)
        return {name: [values[i : i + 4] for i in range(0, len(values), 4)] for name, values in tokenized.items()}

    def compute_metrics(eval_predictions):
        predictions, label_ids = eval_predictions
        return {"accuracy": (np.argmax(predictions, axis=1) == label_ids).astype(np.float32).mean().item()}

    data = [read(path).map(preprocess_function, batched=True) for path in (data_args.train_file, data_args.validation_file)]
    trainer = Trainer(
        model=model,
        args=training_args,
        train_dataset=data[0],
        eval_dataset=data[1],
        processing_class=tokenizer,
        data_collator=default_data_collator if data_args.pad_to_max_length else DataCollatorForMultipleChoice(tokenizer=tokenizer),
        compute_metrics=compute_metrics,
    )
    train(trainer, training_args, data[0])
    evaluate(trainer, training_args, data[1])
    finish(trainer, model_args, "multiple-choice")


if __name__ == "__main__":
    main()
