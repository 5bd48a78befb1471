"""A student from a teacher: some of its layers with their weights, or its design at another width, at random or fitted to the teacher."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from transformers import AutoConfig, PreTrainedConfig, PreTrainedModel

from hf_compress.errors import ArgumentError, TeacherError
from hf_compress.layers.drop import drop_layers
from hf_compress.layers.record import CONFIG_KEY
from hf_compress.layers.stack import find_stacks
from hf_compress.layers.zero import is_split_by_zero, loaded_whole, whole_copy
from hf_compress.students.architecture import architecture_named
from hf_compress.students.warm_start import check_warm_start, warm_start
from hf_compress.students.width import with_width

Init = Literal["random", "pca"]


def student_from_teacher(
    teacher: PreTrainedModel | str,
    *,
    layers_to_keep: Sequence[int] | None = None,
    num_hidden_layers: int | None = None,
    hidden_size: int | None = None,
    num_attention_heads: int | None = None,
    intermediate_size: int | None = None,
    init: Init = "random",
    examples: Iterable[Mapping[str, Any]] | None = None,
    seed: int | None = None,
) -> PreTrainedModel:
    """Make a student; the teacher stays as it is.

    With `layers_to_keep`, or `num_hidden_layers` alone, the student is a copy of the teacher with only those layers, and its config
    records which they were, so a layer map can follow. With another width it has the teacher's architecture, head and label names, and
    random weights, as TinyBERT (4 layers, 312, 12 heads, 1200; arXiv 1909.10351). With `init="pca"` those weights are fitted to what the
    teacher computes on examples, in the principal subspace of its hidden states (see `students/warm_start.py`), and the student carries
    the projection back to the teacher's width, where a `DistillTrainer` finds it; `save_student` writes both.

    Args:
        teacher: a model, or a folder or name to load it from.
        layers_to_keep: counted from 1, as in (1, 4, 8, 12); of encoder and decoder alike where there are both.
        num_hidden_layers: how many layers; without another width, they are spread evenly over the teacher's, first and last included.
        hidden_size: the width; by default the teacher's.
        num_attention_heads: by default the teacher's number.
        intermediate_size: the feed-forward size; by default in the teacher's ratio to the width.
        init: where the weights of another width start: "random", or "pca" for those of BERT, RoBERTa and DistilBERT.
        examples: for "pca", dicts of tensors (batch, tokens), as the teacher takes them; labels are not read. 16,384 tokens are enough.
        seed: for the random weights; by default torch's own state goes on.

    Raises:
        ArgumentError: nothing asked for, two requests that contradict each other, or a width that the heads do not divide.
        DataError: too few examples for "pca".
        LayerDropError: layers that the teacher does not have, or that cannot be left out.
        TeacherError: the teacher cannot be loaded, or its config does not say which model it is.

    Example:
        >>> student = student_from_teacher("bert-base-uncased", layers_to_keep=(1, 4, 8, 12))
        >>> tiny = student_from_teacher(teacher, num_hidden_layers=4, hidden_size=312, num_attention_heads=12, intermediate_size=1200)
    """
    _check_init(init, examples, layers_to_keep, hidden_size)
    if not isinstance(teacher, str) and is_split_by_zero(teacher):
        teacher = whole_copy(teacher)
    widths = (hidden_size, num_attention_heads, intermediate_size)
    if layers_to_keep is not None and num_hidden_layers is not None:
        raise ArgumentError("layers_to_keep and num_hidden_layers contradict each other; give one of them.")
    if layers_to_keep is not None and any(width is not None for width in widths):
        raise ArgumentError("layers_to_keep takes the teacher's weights, which fit its own width only; give num_hidden_layers instead.")
    if layers_to_keep is None and num_hidden_layers is None and all(width is None for width in widths):
        raise ArgumentError("Say what the student is like: layers_to_keep, num_hidden_layers, hidden_size or another width.")
    if layers_to_keep is not None or all(width is None for width in widths):
        return _of_kept_layers(teacher, layers_to_keep, num_hidden_layers)
    config, model_class = _design(teacher)
    config = with_width(
        config,
        num_hidden_layers=num_hidden_layers,
        hidden_size=hidden_size,
        num_attention_heads=num_attention_heads,
        intermediate_size=intermediate_size,
    )
    if init == "pca":
        teacher = load_teacher(teacher) if isinstance(teacher, str) else teacher
        check_warm_start(teacher, config)
    with torch.random.fork_rng(devices=[], enabled=seed is not None):
        if seed is not None:
            torch.manual_seed(seed)
        student = model_class(config)
    if examples is not None and not isinstance(teacher, str):
        warm_start(student, teacher, examples)
    return student


def evenly_spread(num_layers_to_keep: int, num_layers: int) -> tuple[int, ...]:
    """That many of the layers 1 to `num_layers`, first and last among them, the others nearer the bottom where they do not fit evenly.

    The first stays because some models cannot lose it (T5, ModernBERT). 4 of 6 are 1, 2, 4, 6; 4 of 12 are 1, 4, 8, 12; 1 is the last.

    Raises:
        ArgumentError: fewer than one layer, or not fewer than there are.
    """
    if not 1 <= num_layers_to_keep < num_layers:
        raise ArgumentError(f"num_hidden_layers is {num_layers_to_keep}, but the teacher has {num_layers}; expected 1 to {num_layers - 1}.")
    if num_layers_to_keep == 1:
        return (num_layers,)
    return tuple(1 + step * (num_layers - 1) // (num_layers_to_keep - 1) for step in range(num_layers_to_keep))


def load_teacher(name_or_path: str) -> PreTrainedModel:
    """Load a model with the head that it was saved with, whole on each process.

    Raises:
        TeacherError: it cannot be loaded, or its config names no architecture.
    """
    _, model_class = _design(name_or_path)
    try:
        with loaded_whole():
            return model_class.from_pretrained(name_or_path)
    except OSError as error:
        raise TeacherError(f"No weights can be loaded from {name_or_path}: {_first_line(error)}") from error


def without_task(model: PreTrainedModel) -> str | None:
    """Why a model may teach no task: its class, if that has no head, or one of pre-training; else None."""
    name = type(model).__name__
    headless = name.endswith("Model") and not name.endswith(("HeadModel", "HeadsModel"))
    if headless or name.endswith(("ForPreTraining", "ForMaskedLM")):
        return f"{name}, {'which has no head' if headless else 'as it came out of pre-training'}"
    return None


def _check_init(
    init: Init, examples: Iterable[Mapping[str, Any]] | None, layers_to_keep: Sequence[int] | None, hidden_size: int | None
) -> None:
    if init not in ("random", "pca"):
        raise ArgumentError(f"init is {init!r}; expected 'random' or 'pca'.")
    if init == "random":
        if examples is not None:
            raise ArgumentError("examples are read for init='pca' alone; random weights and kept layers need none. Leave one of them out.")
        return
    if layers_to_keep is not None or hidden_size is None:
        raise ArgumentError(
            "init='pca' fits a student of another width, and layers at the teacher's own width keep their weights as they are: "
            "give hidden_size, with num_hidden_layers for the depth, or leave init out."
        )
    if examples is None:
        raise ArgumentError("init='pca' fits the student to what the teacher computes: give examples (--task_name or --train_file).")


def _of_kept_layers(teacher: PreTrainedModel | str, layers_to_keep: Sequence[int] | None, num_hidden_layers: int | None) -> PreTrainedModel:
    """A copy of the teacher without its other layers."""
    student = load_teacher(teacher) if isinstance(teacher, str) else copy.deepcopy(teacher)
    student.requires_grad_(True)  # a frozen teacher's student is to be trained
    if hasattr(student.config, CONFIG_KEY):
        delattr(student.config, CONFIG_KEY)  # layers are counted in this teacher, whatever it was made from
    if layers_to_keep is None:
        assert num_hidden_layers is not None
        depths = {stack.depth for stack in find_stacks(student).values()}
        if len(depths) > 1:
            raise ArgumentError(f"Encoder and decoder are {' and '.join(map(str, sorted(depths)))} layers deep; give layers_to_keep.")
        layers_to_keep = evenly_spread(num_hidden_layers, depths.pop())
    drop_layers(student, layers_to_keep=layers_to_keep)
    return student


def _design(teacher: PreTrainedModel | str) -> tuple[PreTrainedConfig, type[PreTrainedModel]]:
    """The teacher's config, and the class that makes a model of it; no weights are loaded."""
    if not isinstance(teacher, str):
        return teacher.config, type(teacher)
    if teacher.startswith(("/", "./", "../", "~")) and not Path(teacher).expanduser().is_dir():
        raise TeacherError(f"{teacher}: there is no such folder. Give the folder of a model, or its name on the Hub.")
    try:
        config = AutoConfig.from_pretrained(teacher)
    except (OSError, ValueError) as error:
        raise TeacherError(f"There is no model in {teacher}: {_first_line(error)}") from error
    found = architecture_named(config)
    if found is None:
        names = list(getattr(config, "architectures", None) or [])
        raise TeacherError(
            f"The config of {teacher} names {names[0] if names else 'no architecture'}, which is no model of transformers; "
            "load the teacher yourself and pass the model."
        )
    return config, found


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0]
