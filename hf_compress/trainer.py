"""`DistillTrainer`: transformers' Trainer, whose loss compares the student with a teacher.

It only introduces them: what is compared, and how, is in `distillation` and `losses`. In evaluation it is a plain Trainer.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import AutoTokenizer, PreTrainedModel, Trainer
from transformers.trainer_utils import TrainOutput

from hf_compress.arguments import CompressionArguments
from hf_compress.callbacks import LayerDropCallback
from hf_compress.distillation import Distillation, layer_map_for
from hf_compress.errors import ArgumentError, DataError, LossError, TeacherError
from hf_compress.layers.stack import unwrap
from hf_compress.loss_log import FiniteWatch, LossLog
from hf_compress.losses.loss import Loss
from hf_compress.losses.recipes import DEFAULT_RECIPE, losses_of
from hf_compress.phases import PhasedRun
from hf_compress.task import TOKEN_KINDS, ModelShape, kind_of
from hf_compress.teacher import LiveTeacher, load_teacher
from hf_compress.teacher_checks import check_vocabularies, label_order
from hf_compress.teacher_score import teacher_score
from hf_compress.trim_padding import TrimPaddingCollator

logger = logging.getLogger(__name__)


class DistillTrainer(Trainer):
    """A Trainer that distils: it takes all that `transformers.Trainer` takes, and a teacher.

    Args:
        model: the student.
        args: `TrainingArguments`, or `DistillTrainingArguments`, whose flags then say what is not given here.
        teacher: a fine-tuned model, or the path of one; None if no loss needs it.
        losses: what is compared; by default the recipe of the flags.
        compression: the flags, where `args` does not hold them.

    Raises:
        CompressionError: of the kind that fits, before any training, if teacher, losses, layers or data do not go together.

    Example:
        >>> trainer = DistillTrainer(model, args, teacher=teacher, losses=[LogitsLoss(temperature=2.0)],
        ...                          train_dataset=train, processing_class=tokenizer)  # doctest: +SKIP
    """

    # `hf-compress run` binds the flags of the command line to a subclass here.
    compression: CompressionArguments | None = None

    def __init__(
        self,
        model: PreTrainedModel | nn.Module | None = None,
        args: Any = None,
        *positional: Any,
        teacher: PreTrainedModel | nn.Module | str | None = None,
        losses: Sequence[Loss] | None = None,
        compression: CompressionArguments | None = None,
        **kwargs: Any,
    ) -> None:
        given = args if isinstance(args, CompressionArguments) else None
        self.compression = compression or given or type(self).compression or CompressionArguments()
        self.distillation: Distillation | None = None
        self._teacher = teacher if teacher is not None else self.compression.teacher_model_name_or_path
        self._losses = losses
        self._log_parts, self._watch = LossLog(), FiniteWatch()
        self._counts: Tensor | None = None
        self._own_loss_ran = False
        callbacks = list(kwargs.pop("callbacks", None) or [])
        if self.compression.wants_layer_drop or self.compression.wants_freezing:
            callbacks.append(LayerDropCallback.from_arguments(self.compression))
        datasets = [kwargs.get("eval_dataset"), kwargs.get("train_dataset"), *positional[1:3][::-1]]
        examples = next((dataset for dataset in datasets if dataset is not None and not isinstance(dataset, dict)), None)
        for callback in callbacks:
            if isinstance(callback, LayerDropCallback) and examples is not None:
                callback.offer_examples(examples, kwargs.get("data_collator") or (positional[0] if positional else None))
        kwargs["callbacks"] = callbacks
        super().__init__(model, args, *positional, **kwargs)
        # Our loss is a mean over the whole step, on all processes: the Trainer must not scale it once more.
        self.model_accepts_loss_kwargs = False
        self.loss_is_scaled_for_ga = False
        if self.train_dataset is not None:
            self._check_run()
            self._set_up()

    @property
    def _student(self) -> nn.Module:
        assert self.model is not None
        return self.model

    # --- set-up ---

    def _check_run(self) -> None:
        """Refuse what cannot be trained right, before anything is loaded."""
        data: Any = self.train_dataset
        if hasattr(data, "__len__") and len(data) == 0:
            raise DataError("The training data set is empty. Look at the file, and at --max_train_samples.")
        if not hasattr(data, "__len__") and self.compression is not None and self.compression.phases:
            raise DataError("--distill_phases counts epochs, but the training data set has no length. Use --max_steps without phases.")
        if self.model_init is not None and self.compression is not None and self.compression.phases:
            raise ArgumentError("--distill_phases trains one model on, but model_init builds a new one for each phase. Give the model.")
        if self.args.n_gpu > 1:
            raise ArgumentError(
                f"{self.args.n_gpu} GPUs in one process (DataParallel) are not supported: torchrun --nproc_per_node {self.args.n_gpu} "
                "starts one process for each, and is faster; or choose one GPU with CUDA_VISIBLE_DEVICES=0."
            )
        for name in ("gradient_checkpointing_kwargs", "activation_checkpointing_kwargs"):
            if (getattr(self.args, name, None) or {}).get("use_reentrant"):
                raise ArgumentError(f"{name} asks for use_reentrant=True, which hides the hidden states' gradients. Leave it out.")

    def _set_up(self) -> None:
        """Load the teacher, see that it fits, and let the losses choose what they need of both models."""
        assert self.compression is not None
        student = self._student
        flags, path = self.compression, self._teacher if isinstance(self._teacher, str) else None
        if self._losses is None and self._teacher is None:
            raise TeacherError(
                "DistillTrainer has no teacher: give --teacher_model_name_or_path a fine-tuned model, or DistillTrainer(teacher=model). "
                "To drop layers without distilling, leave --trainer_class out."
            )
        model = load_teacher(path, kind_of(student), revision=flags.teacher_revision, dtype=flags.teacher_dtype) if path else self._teacher
        source, shape = None, None
        if isinstance(model, nn.Module):
            if model is student or unwrap(model) is unwrap(student):
                raise TeacherError("Teacher and student are the same model object. Load the teacher a second time, or copy.deepcopy it.")
            saved = path is not None and os.path.isfile(os.path.join(path, "tokenizer_config.json"))
            check_vocabularies(student, model, self.processing_class, AutoTokenizer.from_pretrained(path) if saved else None)
            source = LiveTeacher(model, label_order=label_order(student, model)).to(self.args.device)
            shape = ModelShape.of(model)
        losses = self._losses
        if losses is None:
            layer_map = layer_map_for(flags.layer_map, student, shape) if shape is not None else None
            losses = losses_of(
                flags.recipe or DEFAULT_RECIPE,
                layer_map=layer_map,
                temperature=flags.distill_temperature,
                weights={str(name): weight for name, weight in flags.weights.items()},
                skip_heads=flags.distill_skip_heads,
            )
        self.distillation = Distillation(student, losses, source, shape, self.processing_class)
        for loss in self.distillation.losses:
            logger.info("loss: %s", loss)

    def call_model_init(self, trial: Any = None) -> nn.Module:
        """Build the model anew as `model_init` says, then drop its layers again and compare it with the teacher again."""
        model: nn.Module = super().call_model_init(trial)
        if getattr(self, "callback_handler", None) is not None:
            for callback in self.callback_handler.callbacks:
                if isinstance(callback, LayerDropCallback):
                    callback.on_init_end(self.args, self.state, self.control, model=model)
            self.model = model.to(self.args.device)
            running = self.distillation is not None and self.distillation.running
            self._set_up()
            if running and self.distillation is not None:
                self.distillation.start()
        return model

    # --- data ---

    def _set_signature_columns_if_needed(self) -> None:
        """Keep the teacher's columns too: a DistilBERT student must not lose its BERT teacher's token_type_ids."""
        super()._set_signature_columns_if_needed()
        known: list[str] = self._signature_columns or []
        self._student_columns = frozenset(known)
        self._signature_columns = known + sorted(self._teacher_columns() - set(known))  # type: ignore[assignment]

    def _teacher_columns(self) -> frozenset[str]:
        teacher = self.distillation.teacher if self.distillation is not None else None
        columns: frozenset[str] = getattr(teacher, "columns", frozenset())
        return columns

    def get_train_dataloader(self) -> DataLoader[Any]:
        """The Trainer's, with each batch cut to its longest example."""
        collator = self.data_collator
        if self.compression is None or self.compression.trim_padding is not False:
            self.data_collator = TrimPaddingCollator(collator, labels_are_sequences=kind_of(self._student) in TOKEN_KINDS)
        try:
            loader: DataLoader[Any] = super().get_train_dataloader()
        finally:
            self.data_collator = collator
        return loader

    def get_batch_samples(self, epoch_iterator: Iterator[Any], num_batches: int, device: torch.device) -> tuple[list[Any], Any]:
        """Count what the whole step has, over its micro-batches and the processes, before its first forward."""
        samples, items = super().get_batch_samples(epoch_iterator, num_batches, device)
        if self.distillation is not None:
            self._counts = self.accelerator.reduce(self.distillation.counts(samples, self.args.device), reduction="sum")
        return samples, items

    # --- the loss ---

    def compute_loss(self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None) -> Any:
        """In training the distillation's loss; in evaluation the task's own."""
        inputs = self._with_decoder_inputs(inputs)
        if self.distillation is None or not self.distillation.running or not model.training or self._counts is None:
            own = {name: value for name, value in inputs.items() if self._reaches_student(name)}
            return super().compute_loss(model, own, return_outputs, num_items_in_batch)
        self._own_loss_ran = True
        distillation = self.distillation
        labels = distillation.needs_labels
        outputs = model(**{name: value for name, value in inputs.items() if self._reaches_student(name, labels=labels)})
        signals = distillation.teacher_signals(inputs)
        self._watch.watch(signals, self.state.global_step)
        if self.state.global_step == 0:
            self._watch.check()  # once, so that a broken teacher stops the run at its first step
        parts = distillation.parts(outputs, signals, inputs, self._counts, lambda out: self._labels_mean(out, inputs))
        # Processes' gradients are averaged, and the Trainer divides by the number of micro-batches: both are in our counts already.
        scale = self.accelerator.num_processes * self._micro_batches()
        self._log_parts.add(parts)
        loss = torch.stack([value * weight for value, weight in parts.values()]).sum() * scale
        return (loss, outputs) if return_outputs else loss

    def training_step(self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Any = None) -> Tensor:
        """The Trainer's step, sure that a script's own compute_loss did not take the place of ours."""
        loss: Tensor = super().training_step(model, inputs, num_items_in_batch)
        if self.distillation is not None and not self._own_loss_ran:
            raise LossError(
                f"{type(self).__name__} computes a loss of its own and never calls DistillTrainer.compute_loss, so nothing would be "
                "distilled. Take its compute_loss out, or let it call super().compute_loss(...) and add to what that returns."
            )
        return loss

    def _micro_batches(self) -> int:
        return int(getattr(self, "current_gradient_accumulation_steps", self.args.gradient_accumulation_steps))

    def _labels_mean(self, outputs: Mapping[str, Any], inputs: Mapping[str, Any]) -> Tensor:
        """The task's own loss, a mean over this micro-batch."""
        if self.compute_loss_func is not None:
            mean: Tensor = self.compute_loss_func(outputs, inputs.get("labels"), num_items_in_batch=None)
            return mean
        if self.label_smoother is not None:
            smoothed: Tensor = self.label_smoother(outputs, inputs["labels"], shift_labels=kind_of(self._student) == "causal_lm")
            return smoothed
        if outputs.get("loss") is None:
            raise LossError(
                f"The model returned no loss of its own from the columns {', '.join(inputs)}, but the labels have a weight. "
                "Give the data labels, or leave them out: --distill_weights labels=0."
            )
        own: Tensor = outputs["loss"]
        return own

    def _reaches_student(self, name: str, *, labels: bool = True) -> bool:
        """Whether a column goes into the student: not those only the teacher reads, nor labels that no loss uses."""
        if self.distillation is None or not hasattr(self, "_student_columns"):
            return True
        if not labels and name in ("labels", "label_ids", *self.label_names):
            return False
        return name in self._student_columns or name not in self._teacher_columns()

    def _with_decoder_inputs(self, inputs: dict[str, Any]) -> dict[str, Any]:
        """Encoder-decoder models make decoder inputs from labels; without labels somebody else must."""
        prepare = getattr(unwrap(self._student), "prepare_decoder_input_ids_from_labels", None)
        if prepare is None or "decoder_input_ids" in inputs or "labels" not in inputs:
            return inputs
        return {**inputs, "decoder_input_ids": prepare(labels=inputs["labels"])}

    # --- running, logging, saving ---

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> TrainOutput:
        """Train, phase by phase where phases are given; the teacher's own score is logged first."""
        if self.distillation is None:  # the training data came after __init__
            self._check_run()
            self._set_up()
        assert self.distillation is not None
        try:
            self._report_teacher()
            return self._distill(self.distillation, resume_from_checkpoint, *args, **kwargs)
        finally:
            self.distillation.stop()

    def _distill(self, distillation: Distillation, resume_from_checkpoint: str | bool | None, *args: Any, **kwargs: Any) -> TrainOutput:
        phases = self.compression.phases if self.compression is not None else ()
        self._log_parts.restart(0)
        if not phases:
            distillation.start()
            return super().train(resume_from_checkpoint, *args, **kwargs)

        def train_phase(checkpoint: str | None) -> TrainOutput:
            # A new optimizer and schedule: the old ones hold moments of other losses.
            self.optimizer, self.lr_scheduler = None, None
            self.model_wrapped = self._student
            self._log_parts.restart(0)
            return super(DistillTrainer, self).train(checkpoint, *args, **kwargs)

        return PhasedRun(self.args, self._student, distillation, phases).run(resume_from_checkpoint, train_phase)

    def _report_teacher(self) -> None:
        teacher = self.distillation.teacher if self.distillation is not None and self.distillation.needs_teacher else None
        if teacher is None or self.compute_metrics is None or self.eval_dataset is None or isinstance(self.eval_dataset, dict):
            return
        score = teacher_score(teacher, self.get_eval_dataloader(), self.compute_metrics, self.accelerator, self.label_names)
        if score and self.is_world_process_zero():
            logger.info("The teacher's own score: %s", ", ".join(f"{name} {value:.4g}" for name, value in score.items()))
        if score:
            self.log(score)

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """The Trainer's log, with each part of the loss beside the whole."""
        if "loss" in logs and self.distillation is not None:
            self._watch.check()
            logs = {**logs, **self._log_parts.read(self.state.global_step, lambda t: self.accelerator.reduce(t, reduction="sum"))}
        super().log(logs, *args, **kwargs)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """The Trainer's checkpoint, and the projections beside it."""
        self._watch.check()
        super()._save_checkpoint(model, trial)
        if self.distillation is not None and len(self.distillation.projections) and self.args.should_save:
            folder = os.path.join(self._get_output_dir(trial=trial), f"checkpoint-{self.state.global_step}")
            self.distillation.projections.save(folder)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        """The Trainer's resume, and the projections."""
        super()._load_from_checkpoint(resume_from_checkpoint, model)
        if self.distillation is not None and len(self.distillation.projections):
            self.distillation.projections.load(resume_from_checkpoint)
