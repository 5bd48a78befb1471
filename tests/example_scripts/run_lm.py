"""Language models on one's own `text`, as run_clm.py and run_mlm.py train them: texts in one row, cut into blocks."""

from dataclasses import dataclass, field
from itertools import chain

from example_parts import DataArguments, evaluate, finish, parse, read, tokenizer_of, train
from transformers import (
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    DataCollatorForLanguageModeling,
    Trainer,
    TrainingArguments,
    default_data_collator,
)


@dataclass
class LanguageArguments(DataArguments):
    masked: bool = field(default=False, metadata={"help": "Words are masked, and guessed from both sides."})
    streaming: bool = field(default=False, metadata={"help": "The examples come one after the other, and have no number."})


def main():
    model_args, data_args, training_args = parse(LanguageArguments, TrainingArguments)
    tokenizer = tokenizer_of(model_args)
    auto_model = AutoModelForMaskedLM if data_args.masked else AutoModelForCausalLM
    model = auto_model.from_pretrained(model_args.model_name_or_path)
    block_size = data_args.max_seq_length

    def group_texts(examples):
        examples = tokenizer(examples["text"], return_special_tokens_mask=data_args.masked)
        joined = {name: list(chain(*values)) for name, values in examples.items()}
        total_length = len(joined["input_ids"]) // block_size * block_size
        result = {name: [row[i : i + block_size] for i in range(0, total_length, block_size)] for name, row in joined.items()}
        if not data_args.masked:
            result["labels"] = result["input_ids"].copy()
        return result

    def preprocess_logits_for_metrics(logits, labels):
        return (logits[0] if isinstance(logits, tuple) else logits).argmax(dim=-1)

    def compute_metrics(eval_preds):
        predictions, labels = eval_preds
        if not data_args.masked:
            predictions, labels = predictions[:, :-1], labels[:, 1:]
        counts = labels != -100
        return {"accuracy": float((predictions == labels)[counts].mean())}

    data = [
        read(path).map(group_texts, batched=True, remove_columns=["text"]) for path in (data_args.train_file, data_args.validation_file)
    ]
    stream = [rows.to_iterable_dataset() for rows in data] if data_args.streaming else data
    trainer = Trainer(
        model=model,
        args=training_args,
        train_dataset=stream[0],
        eval_dataset=stream[1],
        processing_class=tokenizer,
        data_collator=DataCollatorForLanguageModeling(tokenizer=tokenizer) if data_args.masked else default_data_collator,
        compute_metrics=compute_metrics,
        preprocess_logits_for_metrics=preprocess_logits_for_metrics,
    )
    train(trainer, training_args, data[0])
    evaluate(trainer, training_args, data[1])
    finish(trainer, model_args, "fill-mask" if data_args.masked else "text-generation")


if __name__ == "__main__":
    main()
