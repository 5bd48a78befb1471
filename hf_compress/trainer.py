"""`DistillTrainer`: transformers' Trainer, whose loss compares the student with a teacher.

It only introduces them: what is compared, and how, is in `distillation` and `losses`. In evaluation it is a plain Trainer, and in training
too where it read flags and they ask for no distillation.
"""

from __future__ import annotations

import inspect
import logging
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import PreTrainedModel, Trainer
from transformers.trainer_utils import TrainOutput

from hf_compress.adapter_off import AdapterOffTeacher, adapter_off_side, asks_adapter_off
from hf_compress.arguments import CompressionArguments
from hf_compress.cached_teacher import ENTRY, CachedTeacher
from hf_compress.callbacks import LayerDropCallback, offer_examples, take_flags
from hf_compress.console_log import show_log
from hf_compress.distillation import Distillation
from hf_compress.layers.checkpoint import refuse_other_layers
from hf_compress.layers.peft import base_is_forgotten, save_dropped_base
from hf_compress.layers.stack import pretrained_model
from hf_compress.loss_log import FiniteWatch, LossLog
from hf_compress.losses.loss import Loss
from hf_compress.phases import PhasedRun
from hf_compress.run_checks import (
    check_flags,
    check_optimizer,
    check_run,
    check_teacher_and_losses,
    check_trainer_class,
    flags_in_force,
    let_ddp_find_unused,
    warn_of_same_model,
)
from hf_compress.task import TOKEN_KINDS, kind_of
from hf_compress.task_loss import labels_mean, refuse_foreign_loss, with_decoder_inputs
from hf_compress.teacher import LiveTeacher
from hf_compress.teacher_cache_run import examples_of, look_for_examples, training_data
from hf_compress.teacher_identity import has_cache
from hf_compress.teacher_on_miss import ask_when_missing, asks_live
from hf_compress.teacher_score import score_for_run
from hf_compress.teacher_side import cached_side, live_side, no_teacher, teacher_at
from hf_compress.teacher_to_disk import store_for_run
from hf_compress.trim_padding import TrimPaddingCollator

logger = logging.getLogger(__name__)

# The names of what a Trainer takes by position, after model and args.
_POSITIONAL = [name for name in inspect.signature(Trainer.__init__).parameters if name not in ("self", "model", "args")]


class DistillTrainer(Trainer):
    """A Trainer that distils: it takes all that `transformers.Trainer` takes, and a teacher.

    Args:
        model: the student.
        args: `TrainingArguments`, or `DistillTrainingArguments`, whose flags then say what is not given here.
        teacher: a fine-tuned model, or the path of one (of an adapter, too); `AdapterOffTeacher(model)`; None if no loss needs it.
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
        teacher: PreTrainedModel | nn.Module | AdapterOffTeacher | str | None = None,
        losses: Sequence[Loss] | None = None,
        compression: CompressionArguments | None = None,
        **kwargs: Any,
    ) -> None:
        show_log()
        cls = type(self)
        self.compression = flags = flags_in_force(compression, args, cls.compression)
        check_trainer_class(cls.__mro__[: cls.__mro__.index(DistillTrainer) + 1], flags)
        take_flags(flags)
        kwargs |= dict(zip(_POSITIONAL, positional, strict=False))
        self.distillation: Distillation | None = None
        self._teacher: Any = teacher if teacher is not None else flags.teacher_model_name_or_path
        self._losses = losses
        has_flags = compression is None and (isinstance(args, CompressionArguments) or cls.compression is not None)
        self._labels_alone = has_flags and teacher is None and losses is None and not flags.wants_distillation
        if not self._labels_alone:
            let_ddp_find_unused(args)
            check_teacher_and_losses(self._teacher, losses, from_disk=self._reads_cache(), nobody=no_teacher(flags.teacher_cache_dir))
        self._log_parts, self._watch = LossLog(), FiniteWatch()
        self._teacher_score: dict[str, float] = {}
        self._student_columns: frozenset[str] | None = None
        self._counts: Tensor | None = None
        self._own_loss_ran = False
        self._loaded_teacher: PreTrainedModel | None = None
        callbacks = list(kwargs.pop("callbacks", None) or [])
        if flags.wants_layer_drop or flags.wants_freezing:
            callbacks.append(LayerDropCallback.from_arguments(flags))
        offer_examples(callbacks, kwargs)
        super().__init__(model, args, **kwargs, callbacks=callbacks)
        if self._labels_alone:
            return
        # Our loss is a mean over the whole step, on all processes: the Trainer must not scale it once more.
        self.model_accepts_loss_kwargs = False
        self._always_divides = hasattr(self, "loss_is_scaled_for_ga")  # earlier Trainers do not where there is a compute_loss_func
        self.loss_is_scaled_for_ga = False
        if self.train_dataset is not None:
            check_run(self, flags.phases)
            self._set_up()

    @property
    def _student(self) -> nn.Module:
        assert self.model is not None
        return self.model

    # --- set-up ---

    def _reads_cache(self) -> bool:
        assert self.compression is not None
        return self.compression.teacher_cache_dir is not None and has_cache(self.compression.teacher_cache_dir)

    def _set_up(self) -> None:
        """Load the teacher, see that it fits, and let the losses choose what they need of both models."""
        assert self.compression is not None
        student, flags = self._student, self.compression
        path = self._teacher if isinstance(self._teacher, str) else None
        handed_over = self._teacher if isinstance(self._teacher, nn.Module) else None
        check_flags(flags, losses_given=self._losses is not None, teacher_given=handed_over is not None)
        if asks_adapter_off(self._teacher):
            side = adapter_off_side(student, self._teacher, flags, self._losses, is_fsdp=self.is_fsdp_enabled)
        elif self._reads_cache():
            side = cached_side(student, flags, self._losses, self.processing_class, handed_over, self.args.device)
        else:
            if path is not None and self._loaded_teacher is None:  # once, also where model_init builds many students
                self._loaded_teacher = teacher_at(path, student, flags, self._losses)
            model = self._loaded_teacher if path is not None else handed_over
            if path is not None:
                warn_of_same_model(student, model, path)
            side = live_side(student, model, path, flags, self._losses, self.processing_class)
        source = side.source.to(self.args.device) if isinstance(side.source, LiveTeacher) else side.source
        label_name = self.label_names[0] if len(self.label_names) == 1 else "labels"
        self.distillation = Distillation(student, side.losses, source, side.shape, self.processing_class, label_name)
        if isinstance(source, CachedTeacher):
            source.cache.refuse_absent(self.distillation.whole_teacher_spec)
            data = self.train_dataset
            ask_when_missing(source, flags, handed_over, kind_of(student), self.accelerator, self.processing_class, data)
        check_optimizer(self.optimizer, self.distillation.projections)
        self._signature_columns = None  # to be read again, with the teacher's
        self._set_signature_columns_if_needed()
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
            if self._labels_alone:
                return model
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
        if self._student_columns is None:
            self._student_columns = frozenset(known)
        self._signature_columns = known + sorted(self._teacher_columns() - set(known))  # type: ignore[assignment]

    def _teacher_columns(self) -> frozenset[str]:
        teacher = self.distillation.teacher if self.distillation is not None else None
        columns: frozenset[str] = getattr(teacher, "columns", frozenset())
        return columns

    def get_train_dataloader(self) -> DataLoader[Any]:
        """The Trainer's, with each batch cut to its longest example."""
        collator = self.data_collator
        wanted = None if self.compression is None else self.compression.trim_padding
        if wanted or (wanted is None and not self._labels_alone):
            half_on_gpu = self.args.device.type == "cuda" and (self.args.fp16 or self.args.bf16)
            sequences = kind_of(self._student) in TOKEN_KINDS
            self.data_collator = TrimPaddingCollator(collator, sequences, pad_to_multiple_of=8 if half_on_gpu else None)
        if self.distillation is not None and isinstance(self.distillation.teacher, CachedTeacher):
            spec = self.distillation.teacher_spec if self.distillation.running else self.distillation.whole_teacher_spec
            self.data_collator = self.distillation.teacher.reading(self.data_collator, spec)
        try:
            loader: DataLoader[Any] = super().get_train_dataloader()
        finally:
            self.data_collator = collator
        return loader

    def get_batch_samples(self, epoch_iterator: Iterator[Any], num_batches: int, device: torch.device) -> tuple[list[Any], Any]:
        """Count what the whole step has, over its micro-batches and the processes, before its first forward."""
        samples, items = super().get_batch_samples(epoch_iterator, num_batches, device)
        if self.distillation is not None and self.distillation.running:
            self._check_that_own_loss_runs()
            self._counts = self.accelerator.reduce(self.distillation.counts(samples, self.args.device), reduction="sum")
        return samples, items

    # --- the loss ---

    def compute_loss(self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None) -> Any:
        """In training the distillation's loss; in evaluation the task's own."""
        if self._labels_alone:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        inputs = with_decoder_inputs(self._student, inputs)
        if self.distillation is None or not self.distillation.running or not model.training or self._counts is None:
            own = {name: value for name, value in inputs.items() if self._reaches_student(name)}
            return super().compute_loss(model, own, return_outputs, num_items_in_batch)
        self._own_loss_ran = True
        distillation = self.distillation
        # The Trainer, too, keeps labels from a model whose loss is computed outside of it.
        labels = distillation.needs_labels and self.compute_loss_func is None and self.label_smoother is None
        with self.accelerator.autocast():  # the student's forward is under it as well
            signals = distillation.teacher_signals(inputs)
        distillation.show(signals)
        outputs = model(**{name: value for name, value in inputs.items() if self._reaches_student(name, labels=labels)})
        self._watch.watch(signals, self.state.global_step)
        if self.state.global_step == 0:
            self._watch.check()  # once, so that a broken teacher stops the run at its first step
        parts = distillation.parts(
            outputs, signals, inputs, self._counts, lambda out, count: labels_mean(self, self._student, out, inputs, count)
        )
        # Processes' gradients are averaged, and the Trainer divides by the number of micro-batches: both are in our counts already.
        scale = self.accelerator.num_processes * self._micro_batches()
        self._log_parts.add(parts, self.state.global_step)
        loss = torch.stack([value * weight for value, weight in parts.values()]).sum() * scale
        return (loss, outputs) if return_outputs else loss

    def _check_that_own_loss_runs(self) -> None:
        """A script's own compute_loss or training_step may have taken the place of ours: a step was counted, and none computed."""
        if self._counts is not None and not self._own_loss_ran:
            refuse_foreign_loss(type(self).__name__)

    def _micro_batches(self) -> int:
        """By how much the Trainer will divide."""
        if not self._always_divides and self.compute_loss_func is not None:
            return 1
        return int(getattr(self, "current_gradient_accumulation_steps", self.args.gradient_accumulation_steps))

    def _reaches_student(self, name: str, *, labels: bool = True) -> bool:
        """Whether a column goes into the student: not those only the teacher reads, nor labels that no loss uses."""
        if name == ENTRY:
            return False
        if not labels and name in ("labels", "label_ids", *self.label_names):
            return False
        return self._student_columns is None or name in self._student_columns or name not in self._teacher_columns()

    # --- running, logging, saving ---

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> TrainOutput:
        """Train, phase by phase where phases are given; the teacher's own score is logged first."""
        if self._labels_alone:
            logger.info("No teacher, no losses and no flags of the distillation are given: training on the labels alone.")
            refuse_other_layers(resume_from_checkpoint, self._student, self.args.output_dir)
            return super().train(resume_from_checkpoint, *args, **kwargs)
        if self.distillation is None:  # the training data came after __init__
            assert self.compression is not None
            check_run(self, self.compression.phases)
            self._set_up()
        assert self.distillation is not None
        self._report_teacher()
        self._teacher_to_disk()
        try:
            return self._distill(self.distillation, resume_from_checkpoint, *args, **kwargs)
        finally:
            self.distillation.stop()

    def _distill(self, distillation: Distillation, resume_from_checkpoint: str | bool | None, *args: Any, **kwargs: Any) -> TrainOutput:
        phases = self.compression.phases if self.compression is not None else ()
        history: list[dict[str, float]] = []

        def train_once(checkpoint: str | bool | None) -> TrainOutput:
            self._log_parts.restart()
            self._counts, self._own_loss_ran = None, False
            refuse_other_layers(checkpoint, self._student, self.args.output_dir)
            output = super(DistillTrainer, self).train(checkpoint, *args, **kwargs)
            self._check_that_own_loss_runs()
            self._watch.check()
            return output

        def train_phase(checkpoint: str | None) -> TrainOutput:
            # A new optimizer and schedule: the old ones hold moments of other losses.
            self.optimizer, self.lr_scheduler = None, None
            if getattr(self.model_wrapped, "_orig_mod", None) is not self._student:  # accelerate compiles a model once
                self.model_wrapped = self._student
            output = train_once(checkpoint)
            history.extend(self.state.log_history)
            self.state.log_history = list(history)  # the Trainer begins a new one for each phase
            return output

        if not phases:
            distillation.start()
            return train_once(resume_from_checkpoint)
        return PhasedRun(self.args, self._student, distillation, phases).run(resume_from_checkpoint, train_phase)

    def _teacher_to_disk(self) -> None:
        """Build the teacher on disk if it was asked for and is not there; from here on the run reads it, and the teacher is let go."""
        assert self.compression is not None and self.distillation is not None
        teacher, flags = self.distillation.teacher, self.compression
        if teacher is None or flags.teacher_cache_dir is None:
            return
        columns: frozenset[str] = getattr(teacher, "columns", frozenset())
        may_lack = isinstance(teacher, CachedTeacher) and teacher.missing is not None
        workers = self.args.dataloader_num_workers
        examples = examples_of(*training_data(self), columns, self.processing_class, workers, may_change=may_lack)
        if isinstance(teacher, LiveTeacher):
            store_for_run(
                self, teacher, examples, self.distillation.whole_teacher_spec, flags, self._losses, self._teacher, self._teacher_score
            )
            self.distillation.stop()
            self.distillation = self._loaded_teacher = None
            if isinstance(self._teacher, nn.Module) and not asks_live(flags):
                self._teacher = None
            del teacher
            self._set_up()
        elif isinstance(teacher, CachedTeacher):
            look_for_examples(teacher.cache, examples, may_lack=may_lack, budget=flags.cache_budget)
        if flags.build_teacher_cache_only:
            logger.info("The teacher on disk is built in %s; ending without training.", flags.teacher_cache_dir)
            raise SystemExit(0)

    def _report_teacher(self) -> None:
        if self.distillation is not None and isinstance(self.distillation.teacher, CachedTeacher):
            self._teacher_score = dict(self.distillation.teacher.cache.manifest.teacher.scores)
            return  # it was asked when it was here
        teacher = self.distillation.teacher if self.distillation is not None and self.distillation.needs_teacher else None
        if teacher is None or self.compute_metrics is None or self.eval_dataset is None or isinstance(self.eval_dataset, dict):
            return
        if kind_of(self._student) != "sequence_classification" or self.args.batch_eval_metrics:
            return  # elsewhere a script's metrics want more than logits
        batches = (with_decoder_inputs(self._student, batch) for batch in self.get_eval_dataloader())
        self._teacher_score = score_for_run(self, teacher, batches, pretrained_model(self._student).config.num_labels)

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """The Trainer's log, with each part of the loss beside the whole."""
        if "loss" in logs and self.distillation is not None:
            self._watch.check()
            logs = {
                **logs,
                **self._teacher_score,
                **self._log_parts.read(self.state.global_step, lambda t: self.accelerator.reduce(t, reduction="sum")),
            }
            self._teacher_score = {}  # once, in the first line of the history
        super().log(logs, *args, **kwargs)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """The Trainer's checkpoint, once the teacher was seen to be sound."""
        self._watch.check()
        if self.distillation is not None and isinstance(self.distillation.teacher, CachedTeacher):
            self.distillation.teacher.write_missing()
        super()._save_checkpoint(model, trial)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """The Trainer's model, in a checkpoint or at the end, and the projections beside it."""
        if base_is_forgotten(self._student):  # adapters over layers that were dropped are of use with that base only
            save_dropped_base(self._student, str(self.args.output_dir), write=self.args.should_save)
        super().save_model(output_dir, _internal_call)
        if self.distillation is not None:
            self.distillation.projections.save(str(output_dir or self.args.output_dir), write=self.args.should_save)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        """The Trainer's resume, and the projections."""
        super()._load_from_checkpoint(resume_from_checkpoint, model)
        if self.distillation is not None and len(self.distillation.projections):
            self.distillation.projections.load(resume_from_checkpoint)
