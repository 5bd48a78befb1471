"""Token classification on one's own files: `tokens` and `ner_tags`."""

import numpy as np
from example_parts import DataArguments, evaluate, finish, parse, read, tokenizer_of, train
from transformers import AutoConfig, AutoModelForTokenClassification, DataCollatorForTokenClassification, Trainer, TrainingArguments


def main():
    model_args, data_args, training_args = parse(DataArguments, TrainingArguments)
    raw = {"train": read(data_args.train_file), "validation": read(data_args.validation_file)}
    label_list = sorted({tag for tags in raw["train"]["ner_tags"] for tag in tags})
    config = AutoConfig.from_pretrained(model_args.model_name_or_path, num_labels=len(label_list))
    tokenizer = tokenizer_of(model_args)
    model = AutoModelForTokenClassification.from_pretrained(model_args.model_name_or_path, config=config)
    model.config.label2id = {label: number for number, label in enumerate(label_list)}
    model.config.id2label = dict(enumerate(label_list))

    def tokenize_and_align_labels(examples):
        padding = "max_length" if data_args.pad_to_max_length else False
        tokenized = tokenizer(
            examples["tokens"], is_split_into_words=True, truncation=True, max_length=data_args.max_seq_length, padding=padding
        )
        tokenized["labels"] = []
        for index, tags in enumerate(examples["ner_tags"]):
            previous, labels = None, []
            for word in tokenized.word_ids(batch_index=index):
                labels.append(-100 if word is None or word == previous else label_list.index(tags[word]))
                previous = word
            tokenized["labels"].append(labels)
        return tokenized

    def compute_metrics(p):
        predictions = np.argmax(p.predictions, axis=2)
        counts = p.label_ids != -100
        return {"accuracy": float((predictions == p.label_ids)[counts].mean()), "labels": int(counts.sum())}

    data = {split: rows.map(tokenize_and_align_labels, batched=True) for split, rows in raw.items()}
    trainer = Trainer(
        model=model,
        args=training_args,
        train_dataset=data["train"],
        eval_dataset=data["validation"],
        processing_class=tokenizer,
        data_collator=DataCollatorForTokenClassification(tokenizer),
        compute_metrics=compute_metrics,
    )
    train(trainer, training_args, data["train"])
    evaluate(trainer, training_args, data["validation"])
    finish(trainer, model_args, "token-classification")


if __name__ == "__main__":
    main()
