"""Encoder-decoders on one's own files, as run_summarization.py and run_translation.py train them: `source` and `target`."""

import numpy as np
from example_parts import DataArguments, evaluate, finish, parse, read, tokenizer_of, train
from transformers import AutoModelForSeq2SeqLM, DataCollatorForSeq2Seq, Seq2SeqTrainer, Seq2SeqTrainingArguments


def main():
    model_args, data_args, training_args = parse(DataArguments, Seq2SeqTrainingArguments)
    tokenizer = tokenizer_of(model_args)
    model = AutoModelForSeq2SeqLM.from_pretrained(model_args.model_name_or_path)

    def preprocess_function(examples):
        padding = "max_length" if data_args.pad_to_max_length else False
        inputs = tokenizer(examples["source"], max_length=data_args.max_seq_length, padding=padding, truncation=True)
        labels = tokenizer(text_target=examples["target"], max_length=data_args.max_seq_length, padding=padding, truncation=True)
        inputs["labels"] = [[token if token != tokenizer.pad_token_id else -100 for token in row] for row in labels["input_ids"]]
        return inputs

    def compute_metrics(eval_preds):
        predictions, labels = (np.where(ids != -100, ids, tokenizer.pad_token_id) for ids in eval_preds)
        texts = [tokenizer.batch_decode(ids, skip_special_tokens=True) for ids in (predictions, labels)]
        shared = [len(set(one.split()) & set(other.split())) / len(set(other.split())) for one, other in zip(*texts, strict=True)]
        return {"shared_words": float(np.mean(shared)), "gen_len": float(np.mean((predictions != tokenizer.pad_token_id).sum(1)))}

    columns = ["source", "target"]
    data = [
        read(path).map(preprocess_function, batched=True, remove_columns=columns)
        for path in (data_args.train_file, data_args.validation_file)
    ]
    trainer = Seq2SeqTrainer(
        model=model,
        args=training_args,
        train_dataset=data[0],
        eval_dataset=data[1],
        processing_class=tokenizer,
        data_collator=DataCollatorForSeq2Seq(tokenizer, model=model, label_pad_token_id=-100),
        compute_metrics=compute_metrics if training_args.predict_with_generate else None,
    )
    train(trainer, training_args, data[0])
    evaluate(trainer, training_args, data[1], max_length=8)
    if training_args.do_predict:
        trainer.save_metrics("predict", trainer.predict(data[1], metric_key_prefix="predict", max_length=8).metrics)
    finish(trainer, model_args, "summarization")


if __name__ == "__main__":
    main()
