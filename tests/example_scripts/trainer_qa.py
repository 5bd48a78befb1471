"""A Trainer of one's own, as run_qa.py has it beside it: its evaluation makes texts of logits before it asks for a score."""

from transformers import Trainer
from transformers.trainer_utils import PredictionOutput


class QuestionAnsweringTrainer(Trainer):
    def __init__(self, *args, eval_examples=None, post_process_function=None, **kwargs):
        super().__init__(*args, **kwargs)
        self.eval_examples = eval_examples
        self.post_process_function = post_process_function

    def _loop(self, dataloader, description, metric_key_prefix):
        compute_metrics, self.compute_metrics = self.compute_metrics, None
        try:
            return self.evaluation_loop(dataloader, description=description, metric_key_prefix=metric_key_prefix)
        finally:
            self.compute_metrics = compute_metrics

    def _scored(self, output, examples, dataset, metric_key_prefix):
        predictions = self.post_process_function(examples, dataset, output.predictions)
        scores = self.compute_metrics(predictions)
        return predictions, {**{f"{metric_key_prefix}_{name}": value for name, value in scores.items()}, **output.metrics}

    def evaluate(self, eval_dataset=None, eval_examples=None, ignore_keys=None, metric_key_prefix="eval"):
        eval_dataset = self.eval_dataset if eval_dataset is None else eval_dataset
        eval_examples = self.eval_examples if eval_examples is None else eval_examples
        output = self._loop(self.get_eval_dataloader(eval_dataset), "Evaluation", metric_key_prefix)
        _, metrics = self._scored(output, eval_examples, eval_dataset, metric_key_prefix)
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def predict(self, predict_dataset, predict_examples, ignore_keys=None, metric_key_prefix="test"):
        output = self._loop(self.get_test_dataloader(predict_dataset), "Prediction", metric_key_prefix)
        predictions, metrics = self._scored(output, predict_examples, predict_dataset, metric_key_prefix)
        return PredictionOutput(predictions=predictions.predictions, label_ids=predictions.label_ids, metrics=metrics)
