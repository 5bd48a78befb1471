"""Codecs: by hand, their error's bound, and what they refuse."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from hf_compress.cache.codec import codec_error, decode, encode
from hf_compress.cache.codec_name import CODEC_NAMES as CODECS
from hf_compress.errors import ArgumentError, CacheError


def test_int8_by_hand() -> None:
    # Scales 1 and 0.01: the second row would be nothing but zeros at the first one's scale.
    values = torch.tensor([[127.0, -63.4, 0.0, 2.5, 3.5, -0.5], [1.27, -0.634, 0.0, 0.1, 0.004, 0.006]])
    parts = encode(values, "int8")
    assert parts["values"].dtype == torch.int8
    assert parts["values"].tolist() == [[127, -63, 0, 2, 4, 0], [127, -63, 0, 10, 0, 1]]
    assert parts["scales"].tolist() == pytest.approx([1.0, 0.01])
    assert decode(parts, "int8")[0].tolist() == [127.0, -63.0, 0.0, 2.0, 4.0, 0.0]
    assert decode(parts, "int8").dtype == torch.float32


def test_int8_is_off_by_half_a_step_at_most() -> None:
    for spread in (1e-20, 1e-3, 1.0, 1e3, 1e30):
        values = spread * torch.randn(200, 64) * torch.logspace(-3, 3, 200)[:, None]
        parts = encode(values, "int8")
        exact = parts["values"].double() * parts["scales"].double()[:, None]
        off = (values.double() - exact).abs()
        assert (off <= parts["scales"].double()[:, None] / 2 * (1 + 1e-4)).all()  # 1e-4 of it: float32's own rounding
        assert (decode(parts, "int8").double() - exact).abs().max() <= 1e-7 * values.abs().max()
        assert (parts["values"].int().abs().amax(1) == 127).all()


def test_int8_of_half_is_int8_of_float() -> None:
    half = torch.randn(9, 16).half()
    for name, part in encode(half, "int8").items():
        assert torch.equal(part, encode(half.float(), "int8")[name])


def test_rows_of_zeros_stay_zeros() -> None:
    values = torch.stack([torch.zeros(4), torch.ones(4), torch.full((4,), 1e-42)])
    parts = encode(values, "int8")
    assert parts["scales"].tolist() == pytest.approx([0.0, 1 / 127, 0.0])
    assert parts["values"].tolist() == [[0] * 4, [127] * 4, [0] * 4]
    decoded = decode(parts, "int8")
    assert decoded[0].tolist() == [0.0] * 4
    assert decoded[1].tolist() == pytest.approx([1.0] * 4)
    assert decoded[2].tolist() == [0.0] * 4


def test_a_row_does_not_depend_on_the_others() -> None:
    values = torch.randn(6, 8) * torch.logspace(-4, 4, 6)[:, None]
    together = decode(encode(values, "int8"), "int8")
    assert torch.equal(together, torch.cat([decode(encode(row[None], "int8"), "int8") for row in values]))


def test_zeros_for_what_is_left_out_do_not_change_the_rest() -> None:
    values, mask = torch.randn(5, 16), torch.rand(5, 16) < 0.3
    mask[:, 0] = True
    parts = encode(values * mask, "int8")
    for row in range(5):
        kept = encode(values[row][mask[row]][None], "int8")
        assert torch.equal(parts["values"][row][mask[row]], kept["values"][0])
        assert parts["scales"][row] == kept["scales"][0]


@pytest.mark.parametrize("codec", ["float32", "float16", "bfloat16"])
def test_floats_are_torchs_and_stay_in_their_type(codec: Any) -> None:
    values = torch.randn(5, 7)
    parts = encode(values, codec)
    assert set(parts) == {"values"}
    assert torch.equal(decode(parts, codec), values.to(getattr(torch, codec)))


@pytest.mark.parametrize("codec", CODECS)
def test_nothing_to_encode(codec: Any) -> None:
    assert decode(encode(torch.zeros(0, 8), codec), codec).shape == (0, 8)
    assert decode(encode(torch.zeros(3, 0), codec), codec).shape == (3, 0)
    assert codec_error(torch.zeros(3, 4), codec).tolist() == [0, 0, 0]


@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_what_is_not_finite_is_refused(codec: Any, bad: float) -> None:
    values = torch.zeros(4, 3)
    values[2, 1] = values[3, 0] = bad
    with pytest.raises(CacheError, match="2 of 12 values to store are NaN or infinite, the first in row 2"):
        encode(values, codec)


def test_what_float16_cannot_hold_is_refused() -> None:
    values = torch.ones(4, 3)
    values[1, 2], values[3, 0] = 65519.0, -65520.0  # the first rounds to 65504, the second to infinity
    with pytest.raises(CacheError, match=r"1 values are too large for float16, .* 65504; .* -65520, in row 3. .*bfloat16 or int8"):
        encode(values, "float16")
    values[3] = 0
    assert decode(encode(values, "float16"), "float16")[1, 2] == 65504
    with pytest.raises(CacheError, match="too large for bfloat16"):
        encode(torch.full((1, 1), torch.finfo(torch.float32).max), "bfloat16")
    assert decode(encode(torch.full((1, 2), 3e38), "int8"), "int8").tolist() == [pytest.approx([3e38] * 2)]


def test_codec_error_by_hand() -> None:
    # Scale 1; 0.4 is stored as 0 and 126.7 as 127: the squared errors are 0.16 and 0.09.
    values = torch.tensor([[127.0, 0.4, 126.7], [127.0, 0.0, 0.0]])
    assert codec_error(values, "int8").tolist() == pytest.approx([0.25, 0], rel=1e-4)
    assert codec_error(torch.tensor([[1.0], [70000.0]]), "float16").tolist() == [float("inf")] * 2


def test_codec_errors_are_in_their_order() -> None:
    values = torch.randn(500, 768)
    errors = {codec: float((codec_error(values, codec).sum() / values.square().sum()).sqrt()) for codec in CODECS}
    assert errors["float32"] == 0
    assert 0 < errors["float16"] < errors["bfloat16"] < errors["int8"] < 0.01


@pytest.mark.parametrize(("codec", "expected"), [("float32", 3072), ("float16", 1536), ("bfloat16", 1536), ("int8", 772)])
def test_bytes_are_those_of_the_parts(codec: Any, expected: int) -> None:
    assert sum(part.nbytes for part in encode(torch.randn(10, 768), codec).values()) == 10 * expected


def test_parts_of_another_codec_are_refused() -> None:
    values = torch.randn(2, 3)
    with pytest.raises(CacheError, match=r"int8 have the parts scales, values.*found values \(float16\)"):
        decode(encode(values, "float16"), "int8")
    with pytest.raises(CacheError, match=r"float16 have the parts values.*found values \(bfloat16\)"):
        decode(encode(values, "bfloat16"), "float16")
    with pytest.raises(CacheError, match="found nothing"):
        decode({}, "float32")


def test_an_unknown_codec_is_refused() -> None:
    one: Any = torch.zeros(1, 1)
    for call in (lambda: encode(one, "flaot16"), lambda: decode({}, "flaot16"), lambda: codec_error(one, "flaot16")):
        with pytest.raises(ArgumentError, match=r"Did you mean 'float16'.* Known: float32, float16, bfloat16, int8"):
            call()
