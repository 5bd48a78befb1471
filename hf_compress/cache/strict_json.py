"""JSON that is read from a cache: nothing is taken for granted, since a flipped byte leaves much that still parses.

    bytes --parse--> JSON value --Fields--> int, str, tuple of str ..., each checked, each error naming its field

Objects with the same key twice, numbers that are not finite, and nesting without end are refused.
"""

from __future__ import annotations

import json
import math
import reprlib
from collections.abc import Callable, Collection, Mapping
from typing import NoReturn, TypeVar

from hf_compress.errors import CacheError

Item = TypeVar("Item")
_SHORT = reprlib.Repr()
_SHORT.maxstring = _SHORT.maxother = 80
_SHORT.maxlist = _SHORT.maxdict = _SHORT.maxtuple = 8


def canonical(value: object) -> bytes:
    """One way of writing a JSON value, for hashing: sorted keys, no spaces, ASCII.

    Raises:
        CacheError: if the value is no JSON: a number that is not finite, an object.
    """
    try:
        return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False).encode("ascii")
    except (TypeError, ValueError, RecursionError) as error:
        raise CacheError(f"{shown(value)} cannot be written as JSON ({error}); give numbers, strings, lists and dictionaries.") from error


def parse(data: bytes, where: str) -> object:
    """Read one JSON value.

    Args:
        data: the bytes, UTF-8.
        where: what an error calls it, such as a path.

    Raises:
        CacheError: if it is no JSON, or has a key twice, or a number that is not finite.
    """
    try:
        value: object = json.loads(
            data.decode("utf-8"), object_pairs_hook=_without_duplicates, parse_constant=_not_finite, parse_float=_finite
        )
    except (ValueError, RecursionError) as error:  # UnicodeDecodeError, JSONDecodeError and ours are ValueErrors
        raise CacheError(f"{where} is damaged: it is no JSON ({error}).") from error
    return value


def shown(value: object) -> str:
    """A value as an error shows it: its start, if it is long."""
    return _SHORT.repr(value)


class Fields:
    """A JSON object whose fields are taken out one by one, each with its type.

    Args:
        value: the JSON value that should be an object.
        where: what errors call it, such as "manifest.json: teacher".
        names: the fields it must have, no more and no fewer; None leaves that open.

    Raises:
        CacheError: if it is no object, or a field is missing or unknown; by the methods, if a field has another type.
    """

    def __init__(self, value: object, where: str, names: Collection[str] | None = None) -> None:
        self.where = where
        if not isinstance(value, dict):
            self._refuse("", value, "an object with fields")
        self._values: dict[str, object] = value
        for name in names or ():
            if name not in value:
                raise CacheError(f"{where}: the field {name!r} is missing; found {shown(sorted(value))}.")
        unknown = sorted(set(value) - set(names)) if names is not None else []
        if unknown:
            raise CacheError(f"{where}: the fields {shown(unknown)} are not known; expected {', '.join(sorted(names or ()))}.")

    def count(self, name: str, least: int = 0, most: int = 2**63 - 1) -> int:
        """A whole number."""
        value = self._values.get(name)
        if type(value) is not int or not least <= value <= most:  # True is an int to isinstance
            self._refuse(name, value, f"a whole number from {least} to {most}")
        return value

    def text(self, name: str, accepts: Callable[[str], object] = bool, expected: str = "some text") -> str:
        """A string that `accepts` finds right; by default, one that is not empty."""
        value = self._values.get(name)
        if not isinstance(value, str) or not accepts(value):
            self._refuse(name, value, expected)
        return value

    def texts(self, name: str) -> tuple[str, ...]:
        """A list of strings."""
        return tuple(self.items(name, lambda value, where: Fields({"": value}, where).text("", lambda text: True)))

    def items(self, name: str, read: Callable[[object, str], Item]) -> list[Item]:
        """A list, each item read by `read(item, where)`."""
        value = self._values.get(name)
        if not isinstance(value, list):
            self._refuse(name, value, "a list")
        return [read(item, f"{self.where}: {name}[{number}]") for number, item in enumerate(value)]

    def counts(self, name: str) -> dict[str, int]:
        """An object whose values are whole numbers, none negative."""
        inner = self.inner(name)
        return {key: inner.count(key) for key in inner.names}

    def numbers(self, name: str) -> dict[str, float]:
        """An object whose values are numbers."""
        inner = self.inner(name)
        return {key: inner.number(key) for key in inner.names}

    def number(self, name: str) -> float:
        """A number."""
        value = self._values.get(name)
        if isinstance(value, bool) or not isinstance(value, int | float):  # True is an int to isinstance
            self._refuse(name, value, "a number")
        return value

    def free(self, name: str) -> dict[str, object]:
        """An object whose values are any JSON."""
        return dict(self.inner(name)._values)

    def inner(self, name: str, names: Collection[str] | None = None) -> Fields:
        """An object inside this one."""
        return Fields(self._values.get(name), f"{self.where}: {name}", names)

    def value(self, name: str) -> object:
        """The field as it is."""
        return self._values.get(name)

    @property
    def names(self) -> tuple[str, ...]:
        """The fields' names, in their order."""
        return tuple(self._values)

    def _refuse(self, name: str, found: object, expected: str) -> NoReturn:
        field = f"{self.where}: {name}" if name else self.where
        raise CacheError(f"{field} is {shown(found)}; expected {expected}.")


def difference(found: object, expected: object, name: str = "") -> str | None:
    """The first place where two JSON values differ.

    Args:
        found: what is there; tuples count as lists.
        expected: what should be.
        name: what the whole is called; the names of fields are added with dots.

    Returns:
        "name: found x, expected y", or None where they are equal.

    Example:
        >>> difference({"teacher": {"dtype": "float16"}}, {"teacher": {"dtype": "float32"}})
        "teacher.dtype: found 'float16', expected 'float32'"
    """
    if isinstance(found, Mapping) and isinstance(expected, Mapping):
        for key in [*expected, *(key for key in found if key not in expected)]:
            inner = f"{name}.{key}" if name else str(key)
            if key not in found or key not in expected:
                return f"{inner}: found {_or_nothing(found, key)}, expected {_or_nothing(expected, key)}"
            if differs := difference(found[key], expected[key], inner):
                return differs
        return None
    if isinstance(found, list | tuple) and isinstance(expected, list | tuple) and len(found) == len(expected):
        pairs = enumerate(zip(found, expected, strict=True))
        return next((differs for number, pair in pairs if (differs := difference(*pair, f"{name}[{number}]"))), None)
    if isinstance(found, list | tuple) and isinstance(expected, list | tuple):
        return f"{name}: found {shown(list(found))}, expected {shown(list(expected))}"
    same = found == expected and isinstance(found, bool) == isinstance(expected, bool)
    return None if same else f"{name}: found {shown(found)}, expected {shown(expected)}"


def _or_nothing(mapping: Mapping[str, object], key: str) -> str:
    return shown(mapping[key]) if key in mapping else "nothing"


def _without_duplicates(pairs: list[tuple[str, object]]) -> dict[str, object]:
    result = dict(pairs)
    if len(result) != len(pairs):
        raise ValueError("a key stands there twice")
    return result


def _not_finite(text: str) -> NoReturn:
    raise ValueError(f"{text} is no number")


def _finite(text: str) -> float:
    number = float(text)
    if not math.isfinite(number):
        raise ValueError(f"{text} is too large a number")
    return number
