"""A student on disk, ready for a script's `--model_name_or_path`: weights, config, and the teacher's tokenizer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import AutoImageProcessor, AutoTokenizer, PreTrainedModel

from hf_compress.errors import ArgumentError
from hf_compress.projection_file import FILE_NAME
from hf_compress.projections import ATTRIBUTE, Projections


def save_student(student: PreTrainedModel, output_dir: str | Path, tokenizer_source: str | Path | None = None) -> str | None:
    """Write the student, the projections that it carries, and a copy of the teacher's tokenizer (or image processor).

    `student.save_pretrained` alone leaves the projections behind, from which a distilling run would start: those of `init="pca"`, and
    those that a run has learnt.

    Args:
        student: what to save.
        output_dir: a folder; made if it is not there.
        tokenizer_source: the teacher's folder or name; None for no tokenizer.

    Returns:
        The class of what was copied beside the model; None if `tokenizer_source` has neither tokenizer nor image processor.

    Raises:
        ArgumentError: the folder is the teacher's own, or a file.

    Example:
        >>> save_student(student_from_teacher("bert", hidden_size=312, init="pca", examples=batches), "tiny", "bert")  # doctest: +SKIP
    """
    folder = Path(output_dir)
    check_output_dir(folder, tokenizer_source)
    processor = None if tokenizer_source is None else _processor(str(tokenizer_source))
    student.save_pretrained(folder)
    (folder / FILE_NAME).unlink(missing_ok=True)  # of a student that was here before
    projections = getattr(student, ATTRIBUTE, None)
    if isinstance(projections, Projections):
        projections.save(folder)
    if processor is None:
        return None
    processor.save_pretrained(folder)
    return type(processor).__name__


def check_output_dir(output_dir: str | Path, source: str | Path | None, *, what: str = "teacher") -> None:
    """Refuse, before any work, a folder that cannot take a student.

    Args:
        output_dir: where it is to go.
        source: what it is made of: a folder, a name, or None.
        what: what to call the source.

    Raises:
        ArgumentError: it is the source's own folder, or a file.
    """
    folder = Path(output_dir)
    if folder.exists() and not folder.is_dir():
        raise ArgumentError(f"{folder} is a file; name a folder to write the student to.")
    if source is not None and Path(source).exists() and folder.resolve() == Path(source).resolve():
        raise ArgumentError(f"{folder} is where the {what} is; name another folder, or the {what} would be overwritten.")


def _processor(source: str) -> Any:
    """What turns the teacher's raw input into tensors; None if there is nothing."""
    for loader in (AutoTokenizer, AutoImageProcessor):
        try:
            found: Any = loader.from_pretrained(source)
        except (OSError, ValueError, KeyError, TypeError, AttributeError, ImportError):
            continue
        # Where there are no files, transformers 5 makes a tokenizer that knows its special tokens and no word.
        if loader is AutoTokenizer and found.vocab_size <= len(found.all_special_tokens):
            continue
        return found
    return None
