"""Groups of teacher layers: the paper's, and what becomes of depths that do not divide."""

from __future__ import annotations

import pytest

from hf_compress.errors import LayerMapError
from hf_compress.layers.layer_groups import check_groups, group_layers, words


@pytest.mark.parametrize(
    ("grouping", "groups"),
    [
        ("regular", "1:1+2+3,2:4+5+6"),
        ("overlap", "1:1+2+3+4,2:3+4+5+6"),
        ("skip_middle", "1:1+2,2:5+6"),
        ("cross", "1:1+3,2:4+6"),
        ("skip_comb", "1:1+3+5,2:2+4+6"),
    ],
)
def test_the_papers_groups_of_six_layers_for_two(grouping: str, groups: str) -> None:
    assert words(group_layers(grouping, 2, 6)) == groups  # type: ignore[arg-type]


@pytest.mark.parametrize("grouping", ["regular", "overlap", "skip_comb"])
@pytest.mark.parametrize(("student", "teacher"), [(4, 6), (5, 12), (1, 7), (3, 3)])
def test_no_layer_is_left_out_where_depths_do_not_divide(grouping: str, student: int, teacher: int) -> None:
    groups = group_layers(grouping, student, teacher)  # type: ignore[arg-type]
    assert len(groups) == student and {layer for group in groups for layer in group} == set(range(1, teacher + 1))
    if grouping == "regular":
        sizes = [len(group) for group in groups]
        assert sum(sizes) == teacher and max(sizes) - min(sizes) <= 1


def test_each_student_layer_learns_from_somebody() -> None:
    for grouping in ("skip_middle", "cross"):
        assert all(group_layers(grouping, 4, 6)) and words(group_layers(grouping, 2, 2)) == "1:1,2:2"  # type: ignore[arg-type]


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(LayerMapError, match="student has 7 layers and the teacher 6"):
        group_layers("regular", 7, 6)
    with pytest.raises(LayerMapError, match="no grouping 'odd'"):
        group_layers("odd", 2, 6)  # type: ignore[arg-type]
    with pytest.raises(LayerMapError, match=r"1 groups .* student has 2 layers"):
        check_groups(((1, 2),), 2, 6)
    with pytest.raises(LayerMapError, match="student layer 2 names layer 7"):
        check_groups(((1,), (6, 7)), 2, 6)
    with pytest.raises(LayerMapError, match="student layer 1 is empty"):
        check_groups(((), (6,)), 2, 6)
