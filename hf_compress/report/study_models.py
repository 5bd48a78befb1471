"""What a study must know of student, teacher and the teacher on disk: their depths before anything runs, and what each arm takes of it.

config of student, flags ----.
config of teacher, or the    +--> Layers --> arms --> layers to store, or why a finished cache cannot be read so
manifest of a finished cache-'
finished cache -------------------> numbers compared, bytes an example
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
import transformers
from torch import nn

from hf_compress.arguments import CompressionArguments
from hf_compress.cache.estimate import TeacherSizes, estimate
from hf_compress.cache.manifest import Manifest
from hf_compress.cache.reader import StoredHow, selection_of_view
from hf_compress.cache.selection import Selection
from hf_compress.cache.shard_reader import Shard
from hf_compress.errors import ArgumentError, CacheError, TeacherError
from hf_compress.layers.drop import drop_layers
from hf_compress.losses.hidden_states import HiddenStatesLoss
from hf_compress.losses.loss import Loss
from hf_compress.report.study_arms import Arm, LayerPairs, Layers
from hf_compress.signals import SignalSpec
from hf_compress.task import Kind, ModelShape, auto_class_name
from hf_compress.teacher_identity import shape_of
from hf_compress.teacher_side import recipe_of, with_selection
from hf_compress.without_weights import model_without_weights, read_config

Counts = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Models:
    """Both models' structures, and the recipe.

    Attributes:
        student, teacher: their shapes.
        losses: of the recipe.
        layers: their depths and the run's own pairs.
    """

    student: ModelShape
    teacher: ModelShape
    losses: tuple[Loss, ...]
    layers: Layers

    @classmethod
    def read(cls, flags: CompressionArguments, student: str, manifest: Manifest | None) -> Models:
        """Read configs, and no weights.

        Args:
            flags: of the runs.
            student: a folder or name with the student's config.
            manifest: of a finished teacher on disk; None where there is none yet.

        Raises:
            TeacherError: no config, or nobody to build the teacher on disk from.
            ArgumentError: the recipe compares no hidden states, or not in a way that takes a part of them.
            CompressionError: of the kind that fits, where layers cannot be dropped or paired.
        """
        if manifest is not None:
            teacher_shape = shape_of(manifest, StoredHow.of(manifest).selection)
        elif flags.teacher_model_name_or_path is not None:
            teacher_shape = ModelShape.of(model_without_weights(flags.teacher_model_name_or_path))
        else:
            raise TeacherError(
                f"There is no finished teacher on disk in {flags.teacher_cache_dir}, and no teacher to build it from: add "
                "--teacher_model_name_or_path with the fine-tuned model, or --teacher_cache_dir with the folder of a finished one."
            )
        student_shape = ModelShape.of(_student(flags, student, teacher_shape.kind))
        if len(teacher_shape.stacks) != 1 or len(student_shape.stacks) != 1:
            raise TeacherError("A model with an encoder and a decoder is not stored on disk, so it cannot be studied.")
        losses = tuple(_losses(flags, manifest))
        (ours,), (theirs,) = student_shape.stacks.values(), teacher_shape.stacks.values()
        compared = next(loss for loss in losses if type(loss) is HiddenStatesLoss)
        own = ours.map_from(compared.layer_map, theirs)
        return cls(student_shape, teacher_shape, losses, Layers(ours.num_layers, theirs.num_layers, tuple(own.pairs)))

    def stored_layers(self, arms: Iterable[Arm]) -> frozenset[int]:
        """The teacher layers that these arms compare, and those of the run's own map."""
        pairs = [*self.layers.own, *(pair for arm in arms for pair in self.layers.pairs(arm.selection))]
        return frozenset(teacher for _, teacher in pairs)

    def signals(self, selection: Selection | None) -> SignalSpec:
        """What a run with this selection asks the teacher for; None for the predictions alone."""
        if selection is None:
            return SignalSpec(logits=True)
        spec = SignalSpec()
        for loss in with_selection(self.losses, selection, self.student, self.teacher):
            for resolved in loss.resolve(self.student, self.teacher):
                spec = spec | resolved.teacher_spec()
        return spec


def _losses(flags: CompressionArguments, manifest: Manifest | None) -> list[Loss]:
    """The recipe of the runs; what they do not say, a finished cache of the same recipe does."""
    losses = recipe_of(flags, {} if manifest is None else manifest.distillation)
    found = [loss for loss in losses if type(loss) is HiddenStatesLoss]
    if not found:
        raise ArgumentError(f"--distill_recipe {flags.recipe} compares no hidden states, and they are what is studied. Take mud.")
    if found[0].kind != "mse" or found[0].pairs != "all":
        raise ArgumentError(
            f"--distill_recipe {flags.recipe} compares hidden states in a way that needs them whole. Take mud, layerwise or tinybert."
        )
    if not any(loss.phase == "prediction" and loss.needs_teacher for loss in losses):
        raise ArgumentError("The losses compare no predictions, so there is no arm without hidden states: leave the logits a weight.")
    return losses


def _student(flags: CompressionArguments, path: str, kind: Kind) -> nn.Module:
    """The student's structure, with the teacher's kind of head, without the layers that the runs drop."""
    name = auto_class_name(kind)
    if name is None:
        raise TeacherError("The teacher has a head of a kind that is not known, so its predictions are not stored on disk.")
    config = read_config(path)
    with torch.device("meta"):
        model: nn.Module = getattr(transformers, name).from_config(config)
    if flags.wants_layer_drop:
        if flags.strategy == "contribution":
            raise ArgumentError(
                "--layer_drop_strategy contribution measures which layers to drop when a run begins, so a study cannot plan its arms. "
                "Drop them first (--layers_to_keep with the layers that a run kept), or name the layers."
            )
        if flags.layer_drop_after_epochs is not None or flags.layer_drop_every_n_epochs is not None:
            raise ArgumentError(
                "--layer_drop_after_epochs and --layer_drop_every_n_epochs change the student while it trains, and all arms of a study "
                "read one teacher on disk. Leave them out."
            )
        drop_layers(
            model,
            strategy=flags.strategy,
            num_layers_to_drop=flags.num_layers_to_drop,
            layers_to_drop=flags.dropped,
            layers_to_keep=flags.kept,
            stack=flags.stack,
        )
    return model


# --- a finished cache ---


def refuse_arms(folder: Path, manifest: Manifest, arms: Iterable[Arm], layers: Layers) -> None:
    """See that a finished cache can be read as every arm.

    Raises:
        CacheError: naming the arms that it cannot be read as, and why.
    """
    reasons: dict[str, list[str]] = {}
    for arm in arms:
        reason = _reason(manifest, arm, layers)
        if reason is not None:
            reasons.setdefault(reason, []).append(arm.name)
    if reasons:
        listed = "; ".join(f"{', '.join(names)}: {reason}" for reason, names in reasons.items())
        raise CacheError(
            f"The teacher on disk in {folder} cannot be read as these arms: {listed}. Leave them out (--study_parts, --study_schemes), or "
            "have another built: another folder with --teacher_cache_dir, and --teacher_model_name_or_path."
        )


def _reason(manifest: Manifest, arm: Arm, layers: Layers) -> str | None:
    columns = {column.name for column in manifest.columns}
    if not any(name.endswith("logits.values") for name in columns):
        return "it does not hold the teacher's predictions"
    if arm.selection is None:
        return None
    held = {int(name.split(".")[2]) for name in columns if name.startswith("hidden_states.")}
    stored = StoredHow.of(manifest).selection
    wanted = selection_of_view(arm.selection, stored)
    ranked = all(f"hidden_states.{stack}.{layer}.importance" in columns for stack in manifest.teacher.stacks for layer in held)
    chosen = {teacher for _, teacher in layers.pairs(wanted)}
    return wanted.within(stored, layers=chosen, stored_layers=held, importance=(stored.rank_by,) if ranked else ())


@dataclass(frozen=True)
class Stored:
    """A finished cache, as far as an arm's share and price hang on it.

    Attributes:
        manifest: its own.
        lengths: (examples,) tokens of each example.
        words: (examples,) those of them that attention_no_sep chooses from.
        exact: whether these were counted, and are not the mean for every example.
    """

    manifest: Manifest
    lengths: Counts
    words: Counts
    exact: bool

    @classmethod
    def read(cls, folder: Path) -> Stored:
        """Count the tokens of its examples, where it holds all of them.

        Raises:
            CacheError: if it is unfinished or damaged.
        """
        manifest = Manifest.load(folder)
        mean = np.full(manifest.examples, max(1, round(manifest.tokens / max(1, manifest.examples))), dtype=np.int64)
        special = next((column for column in manifest.columns if column.name.startswith("special.")), None)
        if special is None:
            return cls(manifest, mean, mean, exact=False)
        lengths, words = [], []
        for info in manifest.shards:
            shard = Shard.open(folder / info.name, info, manifest.columns)
            for record in shard.records(np.arange(len(shard)), [special.name], verify=False):
                marks = record[special.name]
                lengths.append(len(marks))
                words.append(len(marks) - int(marks.sum()))
        return cls(manifest, np.array(lengths, dtype=np.int64), np.array(words, dtype=np.int64), exact=True)

    def share(self, selection: Selection | None, pairs: LayerPairs, student_layers: int) -> float:
        """Numbers compared, of all that a student of M layers could be compared with: M + 1 layers, all tokens, all dimensions.

        Args:
            selection: what is compared of the layers; None for nothing.
            pairs: the layers.
            student_layers: M.
        """
        if selection is None:
            return 0.0
        tokens, hidden = self._chosen(selection), self._hidden_size
        if selection.width_scheme == "magnitude":
            numbers = sum(selection.num_entries(count, hidden) * times for count, times in Counter(tokens.tolist()).items())
        else:
            numbers = int(tokens.sum()) * (selection.num_dimensions(hidden) if selection.width < 1 else hidden)
        return len(pairs) * numbers / ((student_layers + 1) * int(self.lengths.sum()) * hidden)

    def _chosen(self, selection: Selection) -> Counts:
        """(examples,) how many tokens are compared."""
        if selection.tokens is None:
            return self.lengths
        return np.minimum(self.words if selection.length == "attention_no_sep" else self.lengths, selection.tokens)

    @property
    def _hidden_size(self) -> int:
        (size,) = self.manifest.teacher.stacks.values()
        return size["hidden_size"]

    def bytes_an_example(self, models: Models, selection: Selection | None) -> float:
        """What a cache of this data takes that holds no more than the selection: all its bytes but headers, by example."""
        stored = StoredHow.of(self.manifest)
        chosen = selection or Selection.everything()
        spec, sizes = models.signals(selection), TeacherSizes.of(self.manifest, stored.selection)
        total, shared = 0, 0
        for length, times in Counter(self.lengths.tolist()).items():
            found = estimate(spec, chosen, stored.codec, sizes, max(1, length))
            total, shared = total + found.each * times, found.shared
        return (total + shared) / len(self.lengths)

    def score(self, metric: str) -> float | None:
        """The teacher's own."""
        scores = self.manifest.teacher.scores
        return scores.get(f"teacher_{metric}", scores.get(metric))
