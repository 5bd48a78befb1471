"""Text classification on one's own files: `sentence`, or `premise` and `hypothesis`; the labels' type says whether they exclude each other,
stand beside each other (lists), or are numbers.
"""

import numpy as np
from example_parts import DataArguments, evaluate, finish, parse, read, tokenizer_of, train
from transformers import AutoConfig, AutoModelForSequenceClassification, Trainer, TrainingArguments, default_data_collator


def main():
    model_args, data_args, training_args = parse(DataArguments, TrainingArguments)
    raw = {"train": read(data_args.train_file), "validation": read(data_args.validation_file)}
    first = raw["train"]["label"][0]
    is_regression, is_multi_label = isinstance(first, float), isinstance(first, list)
    label_list = (
        [] if is_regression else sorted({name for label in raw["train"]["label"] for name in (label if is_multi_label else [label])})
    )
    config = AutoConfig.from_pretrained(model_args.model_name_or_path, num_labels=1 if is_regression else len(label_list))
    config.problem_type = (
        "regression" if is_regression else "multi_label_classification" if is_multi_label else "single_label_classification"
    )
    tokenizer = tokenizer_of(model_args)
    model = AutoModelForSequenceClassification.from_pretrained(model_args.model_name_or_path, config=config)
    if label_list:
        model.config.label2id = {label: number for number, label in enumerate(label_list)}
        model.config.id2label = dict(enumerate(label_list))

    def preprocess_function(examples):
        texts = (examples["sentence"],) if "sentence" in examples else (examples["premise"], examples["hypothesis"])
        padding = "max_length" if data_args.pad_to_max_length else False
        result = tokenizer(*texts, padding=padding, max_length=data_args.max_seq_length, truncation=True)
        if is_multi_label:
            result["label"] = [[float(name in labels) for name in label_list] for labels in examples["label"]]
        elif not is_regression:
            result["label"] = [label_list.index(label) for label in examples["label"]]
        return result

    def compute_metrics(p):
        if is_regression:
            return {"mse": float(np.mean((np.squeeze(p.predictions) - p.label_ids) ** 2))}
        if is_multi_label:
            return {"hamming": float(np.mean((p.predictions > 0) == (p.label_ids > 0)))}
        return {"accuracy": float(np.mean(np.argmax(p.predictions, axis=1) == p.label_ids))}

    data = {split: rows.map(preprocess_function, batched=True) for split, rows in raw.items()}
    trainer = Trainer(
        model=model,
        args=training_args,
        train_dataset=data["train"],
        eval_dataset=data["validation"],
        processing_class=tokenizer,
        data_collator=default_data_collator if data_args.pad_to_max_length else None,
        compute_metrics=compute_metrics,
    )
    train(trainer, training_args, data["train"])
    evaluate(trainer, training_args, data["validation"])
    if training_args.do_predict:
        trainer.save_metrics("predict", trainer.predict(data["validation"], metric_key_prefix="predict").metrics)
    finish(trainer, model_args, "text-classification")


if __name__ == "__main__":
    main()
