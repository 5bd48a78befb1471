"""Which teacher layer teaches which student layer.

Layers are counted from 1, and 0 is the embedding output. The maps for 3 student and 12 teacher layers:

    uniform     1:4, 2:8, 3:12     evenly spread, the last to the last (TinyBERT, PKD-skip)
    top         1:10, 2:11, 3:12   the teacher's last layers (PKD-last)
    bottom      1:1, 2:2, 3:3      the teacher's first layers
    kept        what dropping left: a student of layers 1, 2 and 12 has 1:1, 2:2, 3:12
"""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from hf_compress.errors import LayerMapError

NAMES = ("uniform", "top", "bottom", "kept")


@dataclass(frozen=True)
class LayerMap:
    """Pairs of (student layer, teacher layer), in the order in which they were given.

    Iterating gives the pairs. Raises LayerMapError if there is no pair, a number is negative, or a student layer is paired
    with two teacher layers.

        >>> tuple(LayerMap.uniform(3, 12))
        ((1, 4), (2, 8), (3, 12))
    """

    pairs: tuple[tuple[int, int], ...]

    def __post_init__(self) -> None:
        if not self.pairs:
            raise LayerMapError("The layer map is empty: give at least one pair of student layer and teacher layer, such as 1:3.")
        for student, teacher in self.pairs:
            if student < 0 or teacher < 0:
                raise LayerMapError(f"The layer map pairs {student}:{teacher}, but layers are counted from 1 (0 is the embedding output).")
        students = [student for student, _ in self.pairs]
        twice = sorted({student for student in students if students.count(student) > 1})
        if twice:
            raise LayerMapError(
                f"The layer map {self} pairs student layer {', '.join(map(str, twice))} twice: pair each student layer once."
            )

    def __iter__(self) -> Iterator[tuple[int, int]]:
        return iter(self.pairs)

    def __len__(self) -> int:
        return len(self.pairs)

    def __str__(self) -> str:
        return ",".join(f"{student}:{teacher}" for student, teacher in self.pairs)

    @property
    def student_layers(self) -> tuple[int, ...]:
        """The student's layers that are taught."""
        return tuple(student for student, _ in self.pairs)

    @property
    def teacher_layers(self) -> tuple[int, ...]:
        """The teacher's layers that teach, one for each pair."""
        return tuple(teacher for _, teacher in self.pairs)

    @classmethod
    def uniform(cls, student_layers: int, teacher_layers: int) -> LayerMap:
        """Student layer i learns from teacher layer round(i * T / S), as in TinyBERT (arXiv 1909.10351) and PKD-skip.

        Halves round to the even layer. Raises LayerMapError if the student has more layers than the teacher.
        """
        _check_depths(student_layers, teacher_layers, "uniform")
        return cls(tuple((i, round(i * teacher_layers / student_layers)) for i in range(1, student_layers + 1)))

    @classmethod
    def top(cls, student_layers: int, teacher_layers: int) -> LayerMap:
        """The student's layers learn from the teacher's last ones, in order (PKD-last, arXiv 1908.09355)."""
        _check_depths(student_layers, teacher_layers, "top")
        return cls(tuple((i, teacher_layers - student_layers + i) for i in range(1, student_layers + 1)))

    @classmethod
    def bottom(cls, student_layers: int, teacher_layers: int) -> LayerMap:
        """The student's layers learn from the teacher's first ones, in order."""
        _check_depths(student_layers, teacher_layers, "bottom")
        return cls(tuple((i, i) for i in range(1, student_layers + 1)))

    @classmethod
    def kept(cls, kept: Sequence[int]) -> LayerMap:
        """Each layer that dropping left learns from the teacher layer that it was: `kept` counts in the full model."""
        return cls(tuple((position, layer) for position, layer in enumerate(kept, start=1)))

    @classmethod
    def parse(cls, text: str, student_layers: int, teacher_layers: int, kept: Sequence[int] | None = None) -> LayerMap:
        """A map from a flag: "uniform", "top", "bottom", "kept", or pairs such as "1:3,2:6,3:9" (student:teacher).

        `kept` is what dropping left of the student, if anything was dropped. The map is validated for both depths.
        Raises LayerMapError.
        """
        words = text.strip().lower()
        if words == "uniform":
            return cls.uniform(student_layers, teacher_layers)
        if words == "top":
            return cls.top(student_layers, teacher_layers)
        if words == "bottom":
            return cls.bottom(student_layers, teacher_layers)
        if words == "kept":
            if kept is None:
                raise LayerMapError(
                    "The layer map 'kept' follows what dropping layers left, but the student's config records no dropped layers. "
                    "Drop layers with hf_compress, or use 'uniform'."
                )
            layer_map = cls.kept(kept)
        else:
            layer_map = cls(tuple(_parse_pair(pair, text) for pair in words.split(",")))
        layer_map.validate(student_layers, teacher_layers)
        return layer_map

    def validate(self, student_layers: int, teacher_layers: int) -> None:
        """Raise LayerMapError unless each pair names layers that student and teacher have (0 to their depths)."""
        for student, teacher in self.pairs:
            if student > student_layers:
                raise LayerMapError(f"The layer map pairs {student}:{teacher}, but the student has {student_layers} layers.")
            if teacher > teacher_layers:
                raise LayerMapError(f"The layer map pairs {student}:{teacher}, but the teacher has {teacher_layers} layers.")


def map_between(
    asked: LayerMap | str | None, student_layers: int, teacher_layers: int, kept: Sequence[int] | None = None, full_depth: int = 0
) -> LayerMap:
    """The map of one stack: the one that is asked for; else what dropping left, where it fits; else a uniform one.

    `asked` may be a map or the text of a flag. `kept` is what dropping left of the student, counted in a model of `full_depth` layers:
    it fits a teacher of that depth. The map is validated for both depths. Raises LayerMapError.
    """
    fits = kept is not None and len(kept) == student_layers and full_depth == teacher_layers
    if isinstance(asked, str):
        return LayerMap.parse(asked, student_layers, teacher_layers, kept if fits else None)
    if asked is None:
        asked = LayerMap.kept(kept) if kept is not None and fits else LayerMap.uniform(student_layers, teacher_layers)
    asked.validate(student_layers, teacher_layers)
    return asked


def _check_depths(student_layers: int, teacher_layers: int, name: str) -> None:
    if student_layers < 1 or teacher_layers < 1:
        raise LayerMapError(
            f"The layer map {name!r} needs layers on both sides, but the student has {student_layers} and the teacher {teacher_layers}."
        )
    if student_layers > teacher_layers:
        raise LayerMapError(
            f"The layer map {name!r} needs a teacher at least as deep as the student, but the student has "
            f"{student_layers} layers and the teacher "
            f"{teacher_layers}. Give pairs such as 1:1,2:{teacher_layers}."
        )


def _parse_pair(pair: str, text: str) -> tuple[int, int]:
    student, colon, teacher = pair.strip().partition(":")
    if colon and student.strip().isdecimal() and teacher.strip().isdecimal():
        return int(student), int(teacher)
    near = difflib.get_close_matches(pair.strip(), NAMES, n=1)
    hint = f" Did you mean {near[0]!r}?" if near else ""
    raise LayerMapError(
        f"Cannot read {pair!r} in the layer map {text!r}.{hint} Give one of {', '.join(NAMES)}, or pairs of "
        "student:teacher such as 1:3,2:6,3:9."
    )
