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

from hf_compress.agreement import all_or_none
from hf_compress.arguments import CompressionArguments
from hf_compress.cached_teacher import ENTRY
from hf_compress.callbacks import drop_again, offer_examples, take_flags
from hf_compress.card.facts import complete_card_of
from hf_compress.chunked_logits import ChunkSettings
from hf_compress.console_log import show_log
from hf_compress.distillation import Distillation
from hf_compress.given_teachers import GivenTeacher, Teacher, given_teachers, lessons, score_teachers
from hf_compress.gradual_drop import follow_checkpoint, tell_after_drop
from hf_compress.loss_log import FiniteWatch, LossLog
from hf_compress.losses.loss import Loss
from hf_compress.phases import PhasedRun
from hf_compress.process_checks import refuse_other_caches, refuse_other_runs
from hf_compress.run_checks import (
    check_flags,
    check_optimizer,
    check_run,
    check_trainer_class,
    flags_in_force,
    let_ddp_find_unused,
)
from hf_compress.several_teachers import members_of, reading_all, stored_members
from hf_compress.student_files import written_plainly
from hf_compress.task import kind_of
from hf_compress.task_loss import labels_mean, refuse_foreign_loss, with_decoder_inputs
from hf_compress.teacher_on_miss import ask_when_missing
from hf_compress.teacher_to_disk import store_teachers
from hf_compress.trials import TrialFlags, flags_left_out
from hf_compress.trim_padding import trimming

logger = logging.getLogger(__name__)

# The names of what a Trainer takes by position, after model and args.
_POSITIONAL = [name for name in inspect.signature(Trainer.__init__).parameters if name not in ("self", "model", "args")]


class DistillTrainer(Trainer):
    """A Trainer that distils: it takes all that `transformers.Trainer` takes, and a teacher.

    Args:
        model: the student.
        args: `TrainingArguments`, or `DistillTrainingArguments`, whose flags then say what is not given here.
        teacher: a fine-tuned model, or the path of one (of an adapter, too); `AdapterOffTeacher(model)`; None if no loss needs it. Or
            several of these: each loss then counts once for each of them, by `teacher_weights`.
        teacher_weights: of several teachers, scaled so that their sum is 1; equal by default. One that weighs 0 is left out.
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
        teacher: Teacher | Sequence[Teacher] = None,
        teacher_weights: Sequence[float] | None = None,
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
        self._losses = losses
        has_flags = compression is None and (isinstance(args, CompressionArguments) or cls.compression is not None)
        self._labels_alone = has_flags and teacher is None and losses is None and not flags.wants_distillation
        self._teachers: tuple[GivenTeacher, ...] = ()
        if not self._labels_alone:
            let_ddp_find_unused(args)
            refuse_other_caches(flags.teacher_cache_dir)
            self._teachers = given_teachers(teacher, teacher_weights, flags, losses)
        self._log_parts, self._watch = LossLog(), FiniteWatch()
        self._teacher_score: dict[str, float] = {}
        self._teacher_was_scored: dict[str, float] | None = None
        self._student_columns: frozenset[str] | None = None
        self._counts: Tensor | None = None
        self._own_loss_ran = False
        self._trials = TrialFlags(flags, args)
        callbacks = [*(kwargs.pop("callbacks", None) or []), *self._trials.callbacks]
        offer_examples(callbacks, kwargs)
        super().__init__(model, args, **kwargs, callbacks=callbacks)
        if self._labels_alone:
            return
        # Our loss is a mean over the whole step, on all processes: the Trainer must not scale it once more.
        self.model_accepts_loss_kwargs = False
        self._always_divides = hasattr(self, "loss_is_scaled_for_ga")  # earlier Trainers do not where there is a compute_loss_func
        self.loss_is_scaled_for_ga = False
        tell_after_drop(callbacks, self._student_changed)
        if self.train_dataset is not None:
            with all_or_none():
                check_run(self, flags.phases)
                self._set_up()

    @property
    def _student(self) -> nn.Module:
        assert self.model is not None
        return self.model

    # --- set-up ---

    def _set_up(self) -> None:
        """Load the teacher, see that it fits, and let the losses choose what they need of both models."""
        assert self.compression is not None
        student, flags = self._student, self.compression
        handed_over = all(each.model is not None for each in self._teachers)
        check_flags(flags, losses_given=self._losses is not None, teacher_given=handed_over)
        taught = lessons(self._teachers, student, self.processing_class, self.args.device, is_fsdp=self.is_fsdp_enabled)
        label_name = self.label_names[0] if len(self.label_names) == 1 else "labels"
        chunks = ChunkSettings(flags.distill_logits_chunk_size, self.compute_loss_func is None and self.label_smoother is None)
        self.distillation = Distillation(student, taught.losses, taught.source, taught.shapes, self.processing_class, label_name, chunks)
        asked, stored = self.distillation.whole_teacher_spec, stored_members(taught.source)
        for each in self._teachers:
            if (source := stored.get(each.number)) is not None:
                source.cache.refuse_absent(asked.of_teacher(each.number))
                data = self.train_dataset
                ask_when_missing(source, each.flags, each.model, kind_of(student), self.accelerator, self.processing_class, data)
        check_optimizer(self.optimizer, self.distillation.projections)
        self.distillation.check_stages(from_disk=[each.number for each in self._teachers if each.flags.teacher_cache_dir is not None])
        self._signature_columns = None  # to be read again, with the teacher's
        self._set_signature_columns_if_needed()
        for loss in self.distillation.losses:
            logger.info("loss: %s", loss)

    def _student_changed(self) -> None:
        if self.distillation is not None:
            self.distillation.student_changed()

    def call_model_init(self, trial: Any = None) -> nn.Module:
        """Build the model anew as `model_init` says, then drop its layers again and compare it with the teacher again."""
        is_first = getattr(self, "callback_handler", None) is None
        if not is_first:
            self.compression = self._trials.take(self, trial, distils=not self._labels_alone)
            tell_after_drop(self.callback_handler.callbacks, self._student_changed)  # a trial may have callbacks of its own
            for each in self._teachers:
                each.take_flags(self.compression)
        model: nn.Module = super().call_model_init(trial)
        if is_first:
            return model  # __init__ does the rest
        drop_again(self, model)
        self.model = model.to(self.args.device)
        if self._labels_alone:
            return model
        running = self.distillation is not None and self.distillation.running
        if self.distillation is not None:
            self.distillation.stop()  # its hooks, and its files
        self.optimizer, self.lr_scheduler = None, None  # of the model before this one, as the Trainer has it a moment later
        self._set_up()
        if running and self.distillation is not None:
            self.distillation.start()
        return model

    def _hp_search_setup(self, trial: Any) -> None:
        """The Trainer's, which sets a trial's values; those of our own flags were set when the student was built."""
        with flags_left_out(self, trial) as rest:
            super()._hp_search_setup(rest)
        self._trial = trial

    # --- data ---

    def _set_signature_columns_if_needed(self) -> None:
        """Keep the teacher's columns too: a DistilBERT student must not lose its BERT teacher's token_type_ids."""
        super()._set_signature_columns_if_needed()
        known: list[str] = self._signature_columns or []
        if self._student_columns is None:
            self._student_columns = frozenset(known)
        self._signature_columns = known + sorted(self._teacher_columns() - set(known))  # type: ignore[assignment]

    def _teacher_columns(self) -> frozenset[str]:
        return frozenset(getattr(self.distillation and self.distillation.teacher, "columns", ()))

    def get_train_dataloader(self) -> DataLoader[Any]:
        """The Trainer's, with each batch cut to its longest example."""
        self._log_parts.restart()  # a first try at training (auto_find_batch_size) may have left some
        collator = self.data_collator
        wanted = None if self.compression is None else self.compression.trim_padding
        if wanted or (wanted is None and not self._labels_alone):
            self.data_collator = trimming(collator, self._student, self.args)
        if self.distillation is not None:
            spec = self.distillation.teacher_spec if self.distillation.running else self.distillation.whole_teacher_spec
            self.data_collator = reading_all(self.distillation.teacher, self.data_collator, spec)
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
            self.distillation.progress = self.state.global_step / max(1, self.state.max_steps - 1)
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
        distillation.show(signals, inputs)
        outputs = model(**{name: value for name, value in inputs.items() if self._reaches_student(name, labels=labels)})
        self._watch.watch(signals, self.state.global_step)
        if self.state.global_step == 0:
            self._watch.check()  # once, so that a broken teacher stops the run at its first step
        parts = distillation.parts(
            outputs, signals, inputs, self._counts, lambda out, count: labels_mean(self, self._student, out, inputs, count)
        )
        # Processes' gradients are averaged, and the Trainer divides by the number of micro-batches: both are in our counts already.
        scale = self.accelerator.num_processes * self._micro_batches()
        self._log_parts.add(parts, self.state.global_step, finite=self.args.logging_nan_inf_filter)
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
        if name.startswith(ENTRY):
            return False
        if not labels and name in ("labels", "label_ids", *self.label_names):
            return False
        return self._student_columns is None or name in self._student_columns or name not in self._teacher_columns()

    # --- running, logging, saving ---

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> TrainOutput:
        """Train, phase by phase where phases are given; the teacher's own score is logged first."""
        if self._labels_alone:
            logger.info("No teacher, no losses and no flags of the distillation are given: training on the labels alone.")
            if self.model is not None:
                self._follow_checkpoint(resume_from_checkpoint)
            return super().train(resume_from_checkpoint, *args, **kwargs)
        if self.model is None and self.distillation is not None:  # a search lets go of it after each trial
            self.model = self.distillation.student
        if self.distillation is None:  # the training data came after __init__
            assert self.compression is not None
            with all_or_none():
                check_run(self, self.compression.phases)
                self._set_up()
        assert self.distillation is not None
        refuse_other_runs(self.train_dataset, self.distillation.losses, members_of(self.distillation.teacher).values())
        self._report_teacher(self.distillation)
        self._teacher_to_disk(self.distillation)
        try:
            return self._distill(self.distillation, resume_from_checkpoint, *args, **kwargs)
        finally:
            self.distillation.stop()

    def _follow_checkpoint(self, checkpoint: str | bool | None) -> None:
        folder, optimizer = self.args.output_dir, self.optimizer
        follow_checkpoint(self.callback_handler.callbacks, self._student, checkpoint, output_dir=folder, optimizer=optimizer)

    def _distill(self, distillation: Distillation, resume_from_checkpoint: str | bool | None, *args: Any, **kwargs: Any) -> TrainOutput:
        phases = self.compression.phases if self.compression is not None else ()
        history: list[dict[str, float]] = []

        def train_once(checkpoint: str | bool | None) -> TrainOutput:
            self._log_parts.restart()
            self._counts, self._own_loss_ran = None, False
            self._follow_checkpoint(checkpoint)
            output = super(DistillTrainer, self).train(checkpoint, *args, **kwargs)
            self._check_that_own_loss_runs()
            self._watch.check()
            return output

        def train_phase(checkpoint: str | None) -> TrainOutput:
            # A new optimizer and schedule: the old ones hold moments of other losses.
            self.optimizer, self.lr_scheduler = None, None
            if getattr(self.model_wrapped, "_orig_mod", None) is not self._student:  # accelerate compiles a model once
                self.model_wrapped = self._student
            if self.args.torch_compile:
                torch.compiler.reset()  # what was compiled for another phase's hooks
            if phased.slows:
                phased.slow_down(self.create_optimizer())
            output = train_once(checkpoint)
            history.extend(self.state.log_history)
            self.state.log_history = list(history)  # the Trainer begins a new one for each phase
            return output

        if not phases:
            distillation.start()
            return train_once(resume_from_checkpoint)
        assert self.compression is not None
        phased = PhasedRun(self.args, self._student, distillation, self.compression)
        return phased.run(resume_from_checkpoint, train_phase)

    def _teacher_to_disk(self, distillation: Distillation) -> None:
        """Build a teacher on disk if it was asked for and is not there; from here on the run reads it, and the teacher is let go."""
        assert self.compression is not None
        if store_teachers(self, self._teachers, members_of(distillation.teacher), distillation.whole_teacher_spec):
            distillation.stop()
            distillation.teacher = self.distillation = None
            self._set_up()
        if self.compression.build_teacher_cache_only:
            logger.info("The teacher on disk is built in %s; ending without training.", self.compression.teacher_cache_dir)
            raise SystemExit(0)

    def _report_teacher(self, distillation: Distillation) -> None:
        if self._teacher_was_scored is None or self.hp_search_backend is None:  # once for all trials of a search
            members = members_of(distillation.teacher)
            self._teacher_was_scored = score_teachers(self, self._teachers, members, asked=distillation.needs_teacher)
        self._teacher_score = self._teacher_was_scored

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
        for source in stored_members(self.distillation.teacher if self.distillation is not None else None).values():
            source.write_missing()
        super()._save_checkpoint(model, trial)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """The Trainer's model, in a checkpoint or at the end, and the projections beside it."""
        with written_plainly(self._student, self.distillation, self.args, output_dir):
            super().save_model(output_dir, _internal_call)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        """The Trainer's resume, and the projections; the model, which model_init may have built anew, is brought to its stage first."""
        self._follow_checkpoint(resume_from_checkpoint)
        super()._load_from_checkpoint(resume_from_checkpoint, model)
        if self.distillation is not None:
            self.distillation.projections.load(resume_from_checkpoint)

    def _load_best_model(self) -> None:
        """The Trainer's best model, and the projections of its step."""
        super()._load_best_model()
        if self.distillation is not None:
            self.distillation.projections.load(str(self.state.best_model_checkpoint))

    def create_model_card(self, *args: Any, measure_latency: bool = False, **kwargs: Any) -> None:
        """The Trainer's card, with what was compressed and how; `measure_latency` times the models on a batch, here and now."""
        super().create_model_card(*args, **kwargs)
        own, dataset = self._losses is not None, kwargs.get("dataset")
        complete_card_of(self, self.distillation, self.compression, own, measure_latency, dataset, self._teacher_was_scored)
