from __future__ import annotations

import pytest

from hf_compress.errors import LayerMapError
from hf_compress.layers.layer_map import LayerMap


def test_named_maps_for_3_of_12() -> None:
    assert tuple(LayerMap.uniform(3, 12)) == ((1, 4), (2, 8), (3, 12))
    assert tuple(LayerMap.top(3, 12)) == ((1, 10), (2, 11), (3, 12))
    assert tuple(LayerMap.bottom(3, 12)) == ((1, 1), (2, 2), (3, 3))
    assert tuple(LayerMap.kept((1, 2, 12))) == ((1, 1), (2, 2), (3, 12))


# MUD's t_indices for 4 and 6 student layers under 8, 10 and 12 teacher layers (halves to the even layer).
@pytest.mark.parametrize(
    ("student", "teacher", "layers"),
    [
        (4, 8, [2, 4, 6, 8]),
        (4, 10, [2, 5, 8, 10]),
        (4, 12, [3, 6, 9, 12]),
        (6, 8, [1, 3, 4, 5, 7, 8]),
        (6, 10, [2, 3, 5, 7, 8, 10]),
        (6, 12, [2, 4, 6, 8, 10, 12]),
        (6, 6, [1, 2, 3, 4, 5, 6]),
    ],
)
def test_uniform(student: int, teacher: int, layers: list[int]) -> None:
    layer_map = LayerMap.uniform(student, teacher)
    assert layer_map.student_layers == tuple(range(1, student + 1))
    assert list(layer_map.teacher_layers) == layers


def test_parse() -> None:
    assert LayerMap.parse("uniform", 3, 12) == LayerMap.uniform(3, 12)
    assert LayerMap.parse(" Top ", 3, 12) == LayerMap.top(3, 12)
    assert LayerMap.parse("bottom", 3, 12) == LayerMap.bottom(3, 12)
    assert LayerMap.parse("kept", 3, 12, kept=(1, 2, 12)) == LayerMap.kept((1, 2, 12))
    assert LayerMap.parse("1:3, 2:6,0:0", 3, 12) == LayerMap(((1, 3), (2, 6), (0, 0)))
    assert str(LayerMap.parse("1:3,2:6", 3, 12)) == "1:3,2:6"


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("unifrom", r"Did you mean 'uniform'\?"),
        ("1-3", "pairs of student:teacher"),
        ("1:3,", "pairs of student:teacher"),
        ("4:3", "the student has 3 layers"),
        ("1:13", "the teacher has 12 layers"),
        ("1:3,1:4", "pairs student layer 1 twice"),
        ("1:-3", "pairs of student:teacher"),
        ("kept", "records no dropped layers"),
    ],
)
def test_parse_refuses(text: str, words: str) -> None:
    with pytest.raises(LayerMapError, match=words):
        LayerMap.parse(text, 3, 12)


def test_refuses_impossible_maps() -> None:
    with pytest.raises(LayerMapError, match="is empty"):
        LayerMap(())
    with pytest.raises(LayerMapError, match="counted from 1"):
        LayerMap(((1, -1),))
    for name in ("uniform", "top", "bottom"):
        with pytest.raises(LayerMapError, match="at least as deep"):
            LayerMap.parse(name, 13, 12)
        with pytest.raises(LayerMapError, match="needs layers on both sides"):
            LayerMap.parse(name, 0, 12)
    with pytest.raises(LayerMapError, match="the teacher has 11 layers"):
        LayerMap.parse("kept", 3, 11, kept=(1, 2, 12))
