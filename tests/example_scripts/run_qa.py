"""Extractive question answering on one's own files: `question`, `context`, `answer` and `start`; several features an example."""

import numpy as np
from example_parts import DataArguments, evaluate, finish, parse, read, tokenizer_of, train
from trainer_qa import QuestionAnsweringTrainer
from transformers import AutoModelForQuestionAnswering, DataCollatorWithPadding, EvalPrediction, TrainingArguments, default_data_collator


def main():
    model_args, data_args, training_args = parse(DataArguments, TrainingArguments)
    tokenizer = tokenizer_of(model_args)
    model = AutoModelForQuestionAnswering.from_pretrained(model_args.model_name_or_path)
    examples = {"train": read(data_args.train_file), "validation": read(data_args.validation_file)}

    def features_of(rows):
        tokenized = tokenizer(
            rows["question"],
            rows["context"],
            truncation="only_second",
            max_length=data_args.max_seq_length,
            stride=2,
            return_overflowing_tokens=True,
            return_offsets_mapping=True,
            padding="max_length" if data_args.pad_to_max_length else False,
        )
        places = tokenized.pop("overflow_to_sample_mapping")
        offsets = tokenized.pop("offset_mapping")
        tokenized["example"] = places
        tokenized["start_positions"], tokenized["end_positions"], tokenized["offsets"] = [], [], []
        for feature, place in enumerate(places):
            context = [
                list(span) if sequence == 1 else None
                for span, sequence in zip(offsets[feature], tokenized.sequence_ids(feature), strict=True)
            ]
            start, end = rows["start"][place], rows["start"][place] + len(rows["answer"][place])
            inside = [token for token, span in enumerate(context) if span and span[0] >= start and span[1] <= end]
            tokenized["start_positions"].append(inside[0] if inside else 0)  # the answer is in another feature: [CLS]
            tokenized["end_positions"].append(inside[-1] if inside else 0)
            tokenized["offsets"].append([span or [0, 0] for span in context])
        return tokenized

    data = {split: rows.map(features_of, batched=True, remove_columns=rows.column_names) for split, rows in examples.items()}

    def post_processing_function(examples, features, predictions):
        starts, ends = predictions
        best = {}
        for feature, row in enumerate(features):
            start, end = int(np.argmax(starts[feature])), int(np.argmax(ends[feature]))
            score = starts[feature][start] + ends[feature][end]
            if score > best.get(row["example"], (-np.inf, ""))[0]:
                spans, context = row["offsets"], examples[row["example"]]["context"]
                in_text = max(start, end) < len(spans)
                best[row["example"]] = (score, context[spans[start][0] : spans[end][1]] if in_text else "")
        return EvalPrediction(predictions=[best[number][1] for number in sorted(best)], label_ids=list(examples["answer"]))

    def compute_metrics(p):
        return {"exact_match": float(np.mean([one == other for one, other in zip(p.predictions, p.label_ids, strict=True)]))}

    trainer = QuestionAnsweringTrainer(
        model=model,
        args=training_args,
        train_dataset=data["train"].remove_columns(["example", "offsets"]),
        eval_dataset=data["validation"],
        eval_examples=examples["validation"],
        processing_class=tokenizer,
        data_collator=default_data_collator if data_args.pad_to_max_length else DataCollatorWithPadding(tokenizer),
        post_process_function=post_processing_function,
        compute_metrics=compute_metrics,
    )
    train(trainer, training_args, data["train"])
    evaluate(trainer, training_args, data["validation"])
    if training_args.do_predict:
        trainer.save_metrics("predict", trainer.predict(data["validation"], examples["validation"], metric_key_prefix="predict").metrics)
    finish(trainer, model_args, "question-answering")


if __name__ == "__main__":
    main()
