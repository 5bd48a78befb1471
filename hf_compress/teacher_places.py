"""Several teachers in flags: "my-large,my-base" names two, and "cache-1,cache-2" where each is on disk. No torch here.

    --teacher_model_name_or_path my-large,my-base   --teacher_weights 0.7,0.3
    --teacher_cache_dir cache-1,cache-2             --teacher_weights 0.7,0.3
    --teacher_model_name_or_path ,my-base           --teacher_cache_dir cache-1,        the first from disk, the second live

A place stands for a teacher; one may be empty. In a file they may be a list, with null for an empty place.
"""

from __future__ import annotations

import os
from collections.abc import Sequence

from hf_compress.errors import ArgumentError


def as_text(value: object, *, flag: str) -> str | None:
    """A flag's value as text: a list, as files have it, with commas between.

    Raises:
        ArgumentError: a list of something else than texts, or with a comma in one.
    """
    if value is None or isinstance(value, str):
        return value
    if not isinstance(value, (list, tuple)) or not all(each is None or isinstance(each, (str, int, float)) for each in value):
        raise ArgumentError(f"--{flag} is {value!r}; expected text, or a list with one text for each teacher.")
    texts = ["" if each is None else str(each) for each in value]
    if len(texts) > 1 and any("," in text for text in texts):
        raise ArgumentError(f"--{flag}: a comma stands between teachers, so none can stand in {next(t for t in texts if ',' in t)!r}.")
    return ",".join(texts)


def places(value: str | None, count: int, *, flag: str) -> tuple[str | None, ...]:
    """What a flag says of each of `count` teachers; all None where it is not given.

    Raises:
        ArgumentError: it speaks of another number of teachers.
    """
    if count == 1 or value is None:
        return (value,) + (None,) * (count - 1)
    parts = tuple(part.strip() or None for part in value.split(","))
    if len(parts) != count:
        raise ArgumentError(f"--{flag} {value} has {len(parts)} places, but there are {count} teachers: give one for each, with commas.")
    return parts


def count_of_teachers(models: str | None, folders: str | None, weights: object) -> int:
    """Of how many teachers the flags speak. A folder that is there, and has a comma in its name, is one.

    Args:
        models: `--teacher_model_name_or_path`.
        folders: `--teacher_cache_dir`.
        weights: `--teacher_weights`.
    """
    if models is None and weights is not None:
        return len(_numbers(weights))
    value = models if models is not None else folders
    return 1 if value is None or os.path.isdir(value) else len(value.split(","))


def shares(weights: object, count: int) -> tuple[float, ...]:
    """The weights of `count` teachers, so that their sum is 1; equal ones where none are given.

    Raises:
        ArgumentError: another number of them, a negative one, or all 0.
    """
    if weights is None:
        return (1 / count,) * count
    numbers = _numbers(weights)
    if len(numbers) != count:
        raise ArgumentError(
            f"--teacher_weights has {len(numbers)} numbers, and there {'is one teacher' if count == 1 else f'are {count} teachers'}: give "
            "one for each, as in --teacher_model_name_or_path my-large,my-base --teacher_weights 0.7,0.3."
        )
    if any(not 0 <= number < float("inf") for number in numbers) or not sum(numbers):
        raise ArgumentError(f"--teacher_weights {_words(numbers)}: a weight is 0 (that teacher is left out) or more, and one is above 0.")
    return tuple(number / sum(numbers) for number in numbers)


def check_teacher_places(models: str | None, folders: str | None, revision: str | None, weights: object) -> None:
    """Refuse flags that speak of other numbers of teachers, and folders that are two teachers' at once.

    Args:
        models, folders, weights: as for `count_of_teachers`.
        revision: `--teacher_revision`.

    Raises:
        ArgumentError: naming the flag.
    """
    count = count_of_teachers(models, folders, weights)
    places(models, count, flag="teacher_model_name_or_path")
    cached = places(folders, count, flag="teacher_cache_dir")
    if weights is not None:
        shares(weights, count if models is not None or folders is not None else len(_numbers(weights)))
    if count == 1 and weights is not None:
        raise ArgumentError(
            f"--teacher_weights {weights} weighs several teachers against each other, and there is one. What the labels weigh beside it "
            "says --distill_weights labels=0.3."
        )
    if count == 1:
        return
    if revision is not None:
        raise ArgumentError(f"--teacher_revision {revision}: of which of {count} teachers? Download that one, and give its folder.")
    twice = [folder for folder in cached if folder is not None and cached.count(folder) > 1]
    if twice:
        raise ArgumentError(f"--teacher_cache_dir names {twice[0]} twice: each teacher has a folder of its own.")


def _numbers(weights: object) -> tuple[float, ...]:
    parts: Sequence[object] = weights if isinstance(weights, (list, tuple)) else str(weights).split(",")
    try:
        return tuple(float(str(part)) for part in parts)
    except ValueError:
        raise ArgumentError(f"--teacher_weights is {weights!r}; write one number for each teacher, as in 0.7,0.3.") from None


def _words(numbers: Sequence[float]) -> str:
    return ",".join(f"{number:g}" for number in numbers)
