"""Groups of teacher layers, one for each student layer. For 2 student and 6 teacher layers, counted from 1:

    regular       1 2 3 | 4 5 6        next to each other, as even as they go
    overlap       1 2 3 4 | 3 4 5 6    and one layer more on each side
    skip_middle   1 2 | 5 6            without the layer that is nearest to the teacher's middle
    cross         1 3 | 4 6            every other one
    skip_comb     1 3 5 | 2 4 6        every S-th layer, from the first, from the second, ...

The names, and these groups, are of CKD's released code (2010.03034); it has them for these depths, and here they are for any.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Literal, get_args

from hf_compress.errors import LayerMapError

Grouping = Literal["regular", "overlap", "skip_middle", "cross", "skip_comb"]
Groups = tuple[tuple[int, ...], ...]


def group_layers(grouping: Grouping, student_layers: int, teacher_layers: int) -> Groups:
    """The teacher layers that each student layer learns from, in order.

    Args:
        grouping: see above.
        student_layers, teacher_layers: the depths; where they do not divide, the groups differ by one layer.

    Raises:
        LayerMapError: for an unknown name, or a student deeper than its teacher.
    """
    if grouping not in get_args(Grouping):
        raise LayerMapError(f"There is no grouping {grouping!r} of layers; there are {', '.join(get_args(Grouping))}.")
    if not 1 <= student_layers <= teacher_layers:
        raise LayerMapError(
            f"Each student layer needs a teacher layer of its own, but the student has {student_layers} layers and the teacher "
            f"{teacher_layers}. Take losses that share teacher layers: HiddenStatesLoss with pairs such as 1:1,2:1."
        )
    if grouping == "skip_comb":
        return tuple(tuple(range(first, teacher_layers + 1, student_layers)) for first in range(1, student_layers + 1))
    bounds = [round(i * teacher_layers / student_layers) for i in range(student_layers + 1)]
    groups = [tuple(range(low + 1, high + 1)) for low, high in pairwise(bounds)]
    if grouping == "overlap":
        return tuple(tuple(range(max(1, group[0] - 1), min(teacher_layers, group[-1] + 1) + 1)) for group in groups)
    if grouping == "cross":
        return tuple(group[::2] for group in groups)
    if grouping == "skip_middle":
        middle = (teacher_layers + 1) / 2
        return tuple(tuple(layer for layer in group if layer != _nearest(group, middle)) or group for group in groups)
    return tuple(groups)


def check_groups(groups: Groups, student_layers: int, teacher_layers: int) -> None:
    """See that groups given by hand fit the models.

    Raises:
        LayerMapError: another number of groups than student layers, an empty group, or a layer that the teacher does not have.
    """
    if len(groups) != student_layers:
        raise LayerMapError(
            f"There are {len(groups)} groups of teacher layers, but the student has {student_layers} layers: one group each."
        )
    for number, group in enumerate(groups, start=1):
        if not group:
            raise LayerMapError(f"The group of student layer {number} is empty: name at least one teacher layer.")
        outside = [layer for layer in group if not 1 <= layer <= teacher_layers]
        if outside:
            raise LayerMapError(
                f"The group of student layer {number} names layer {outside[0]}, but the teacher has {teacher_layers} layers, from 1."
            )


def words(groups: Groups) -> str:
    """((1, 2), (3, 4)) -> "1:1+2,2:3+4": student layer, then the teacher's."""
    return ",".join(f"{number}:{'+'.join(map(str, group))}" for number, group in enumerate(groups, start=1))


def _nearest(group: tuple[int, ...], place: float) -> int:
    return min(group, key=lambda layer: (abs(layer - place), layer))
