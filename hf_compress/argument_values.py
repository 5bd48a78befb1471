"""From what a person writes in a flag or a file to what the code works with. Pure text and numbers: no torch.

    "5-8" or [5, 6, 7, 8]                 -> (5, 6, 7, 8)                              layer_numbers
    "labels=0.5,logits=1" or a mapping    -> {"labels": 0.5, "logits": 1.0}            numbers_by_name
    "1:3,2:6" or a mapping                -> ((1, 3), (2, 6))                          layer_pairs
    "1.5GB", "512MiB" or 300000           -> 1500000000, 536870912, 300000             number_of_bytes
    "0.5" in its range                    -> 0.5                                       number_within

Every function takes the flag's name as well, since an error must show the words that the user can change.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from decimal import Decimal
from difflib import get_close_matches
from typing import Any

from hf_compress.errors import ArgumentError

INFINITE = float("inf")
_UNITS = {"": 1, "b": 1, **{f"{letter}b": 1000**power for power, letter in enumerate("kmgt", start=1)}}
_UNITS |= {f"{letter}ib": 1024**power for power, letter in enumerate("kmgt", start=1)}


def nearest_name(name: str, known: Iterable[str]) -> str:
    """A hint " Did you mean 'symmetric'?", or "" where nothing known is near."""
    found = get_close_matches(name, list(known), n=1, cutoff=0.6)
    return f" Did you mean '{found[0]}'?" if found else ""


def one_of(name: str, known: Sequence[str], *, flag: str) -> str:
    """The name itself, if it is known.

    Raises:
        ArgumentError: it is not; the message lists what is, and what is nearest.
    """
    if name in known:
        return name
    raise ArgumentError(f"--{flag}: there is no '{name}'.{nearest_name(str(name), known)} Known: {', '.join(known)}.")


def layer_numbers(value: object, *, flag: str, lowest: int = 1) -> tuple[int, ...]:
    """The layers in ascending order, counted from 1, out of "5-8", "5,6,7,8", "1,9-12", a list or one number.

    Where `lowest` is 0, the embedding output counts as layer 0.

    Raises:
        ArgumentError: not numbers or ranges, a layer 0, a range that runs backwards, a layer named twice, or none at all.
    """
    parts = value if isinstance(value, (list, tuple)) else str(value).replace(",", " ").split()
    numbers = [number for part in parts for number in _range(str(part), flag=flag)]
    if not numbers:
        raise ArgumentError(f"--{flag} names no layer; write for example 5-8 or 5,6,7,8.")
    if min(numbers) < lowest:
        raise ArgumentError(f"--{flag}: there is no layer 0; layers are counted from 1. For the first layer write 1.")
    twice = sorted({number for number in numbers if numbers.count(number) > 1})
    if twice:
        raise ArgumentError(f"--{flag} names layer {', '.join(map(str, twice))} twice; name each layer once.")
    return tuple(sorted(numbers))


def _range(part: str, *, flag: str) -> range:
    """One part of a list of layers: "5" or "5-8"."""
    first, dash, last = part.partition("-")
    if not first.isdecimal() or (dash and not last.isdecimal()):
        raise ArgumentError(f"--{flag}: '{part}' is no layer; write numbers counted from 1, as in 5-8 or 5,6,7,8.")
    start, end = int(first), int(last) if dash else int(first)
    if end < start:
        raise ArgumentError(f"--{flag}: the range {part} runs backwards; write {end}-{start}.")
    return range(start, end + 1)


def numbers_by_name(value: str | Mapping[str, float], known: Sequence[str], *, flag: str) -> dict[str, float]:
    """Names with numbers out of "labels=0.5,logits=1" or a mapping, in the order given.

    Raises:
        ArgumentError: a part that is not name=number, an unknown name (with the nearest), or a name given twice.
    """
    example = f"{known[0]}=1,{known[1]}=0.5" if len(known) > 1 else f"{known[0]}=1"
    pairs: list[tuple[str, object]] = []
    if isinstance(value, str):
        for part in filter(None, (piece.strip() for piece in value.split(","))):
            name, equals, text = part.partition("=")
            if not equals:
                raise ArgumentError(f"--{flag}: '{part}' gives no number; write name=number, as in {example}.")
            pairs.append((name.strip(), text.strip()))
    elif isinstance(value, Mapping):
        pairs.extend(value.items())
    else:
        raise ArgumentError(f"--{flag} is {value!r}; write names with numbers, as in {example}.")
    if not pairs:
        raise ArgumentError(f"--{flag} is empty; write names with numbers, as in {example}.")
    numbers: dict[str, float] = {}
    for name, number in pairs:
        one_of(name, known, flag=flag)
        if name in numbers:
            raise ArgumentError(f"--{flag} names {name} twice.")
        try:
            numbers[name] = float(str(number))
        except ValueError:
            raise ArgumentError(f"--{flag}: '{number}' for {name} is no number; write for example {example}.") from None
    return numbers


def layer_pairs(value: object, *, flag: str) -> tuple[tuple[int, int], ...]:
    """Pairs (student layer, teacher layer) out of "1:3,2:6", {1: 3, 2: 6} or [[1, 3], [2, 6]]; 0 is the embedding output.

    Raises:
        ArgumentError: not pairs of whole numbers, or a student layer that stands twice.
    """
    found: list[tuple[int, int]] = []
    parts: list[str]
    if isinstance(value, str):
        parts = [part.strip() for part in value.split(",") if part.strip()]
    elif isinstance(value, Mapping):
        parts = [f"{student}:{teacher}" for student, teacher in value.items()]
    elif isinstance(value, (list, tuple)):
        parts = [":".join(str(number) for number in pair) if isinstance(pair, (list, tuple)) else str(pair) for pair in value]
    else:
        raise ArgumentError(f"--{flag} is {value!r}; write pairs of layers as text, as in '1:3,2:6' (in YAML with the quotes).")
    for part in parts:
        student, _, teacher = part.partition(":")
        if not (student.strip().isdecimal() and teacher.strip().isdecimal()):
            raise ArgumentError(
                f"--{flag}: '{part}' is no pair of layers; write student:teacher, as in 1:3,2:6,3:9 (0 is the embedding output), "
                "or uniform, top, bottom or kept."
            )
        found.append((int(student), int(teacher)))
    students = [student for student, _ in found]
    twice = sorted({student for student in students if students.count(student) > 1})
    if twice:
        raise ArgumentError(f"--{flag} gives the student's layer {', '.join(map(str, twice))} two teachers; name each student layer once.")
    if not found:
        raise ArgumentError(f"--{flag} is empty; write uniform, top, bottom, kept, or pairs as in 1:3,2:6,3:9.")
    return tuple(found)


def number_of_bytes(value: object, *, flag: str) -> int:
    """Bytes out of "200MB", "1.5 GB", "512MiB" or a number; kB, MB, GB, TB are powers of 1000, KiB, MiB, GiB, TiB of 1024.

    Raises:
        ArgumentError: no number, an unknown unit, or less than one byte.
    """
    found = re.fullmatch(r"\s*(\d{1,15}(?:\.\d{1,15})?|\.\d{1,15})\s*([a-z]*)\s*", str(value).lower(), re.ASCII)
    if isinstance(value, bool) or found is None or found[2] not in _UNITS:
        raise ArgumentError(f"--{flag} is {value!r}; write a number of bytes with a unit, as in 200MB, 1.5GB, 500kB or 64MiB.")
    size = int(Decimal(found[1]) * _UNITS[found[2]])
    if size < 1:
        raise ArgumentError(f"--{flag} is {value!r}, which is no byte; write for example 200MB.")
    return size


def number_within(value: Any, low: float, high: float, *, flag: str, whole: bool = False) -> Any:
    """A number as a file may write it, seen to be in its range: `low` itself is in it for whole numbers only, `high` is not.

    Returns:
        An int if it is to be whole, else a float; None where there is no value.

    Raises:
        ArgumentError: no number, or one out of range.
    """
    if value is None:
        return None
    try:
        number = float(value)
    except (TypeError, ValueError):
        raise ArgumentError(f"--{flag} is {value!r}; expected a number.") from None
    if whole and (number < low or number != int(number)):
        raise ArgumentError(f"--{flag} is {value}; expected a whole number of at least {low:g}.")
    if not whole and not low < number < high:
        limits = f"between {low:g} and {high:g}" if high < INFINITE else f"above {low:g}"
        raise ArgumentError(f"--{flag} is {value}; expected a number {limits}.")
    return int(number) if whole else number
