"""In which numbers values are stored.

float32     as they are                        4 bytes
float16     11 bits, up to 65,504              2 bytes
bfloat16    8 bits, float32's range            2 bytes
int8        255 steps of a scale of its own    1 byte, and 4 for each row's scale
"""

from __future__ import annotations

from collections.abc import Mapping
from difflib import get_close_matches

import torch
from torch import Tensor

from hf_compress.cache.codec_name import CODEC_NAMES, CodecName
from hf_compress.errors import ArgumentError, CacheError

_DTYPES: dict[str, torch.dtype] = {
    "float32": torch.float32,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
    "int8": torch.int8,
}
_STEPS = 127
# Below it a scale would be denormal and lose its precision; such a row is zero for every purpose.
_SMALLEST_SCALE = torch.finfo(torch.float32).tiny


def encode(values: Tensor, codec: CodecName) -> dict[str, Tensor]:
    """Values as they are stored.

    Args:
        values: (rows, width) float32 or half; a row is a token. Where only some entries of a row are kept, put zeros for the others,
            encode, then take the kept ones out of "values": zeros do not change the row's scale.
        codec: see above.

    Returns:
        "values": (rows, width) in the codec's dtype; for int8 also "scales": (rows,) float32, the row's max|h| / 127, so that no entry is
        off by more than half of it. A row whose scale would be below 1.2e-38 is stored as zeros with scale 0.

    Raises:
        CacheError: a value is NaN or infinite, or too large for the codec.
        ArgumentError: no such codec.
    """
    dtype = _dtype(codec)
    values = values.detach().float()
    finite = values.isfinite()
    if not bool(finite.all()):
        raise CacheError(
            f"{int((~finite).sum())} of {values.numel()} values to store are NaN or infinite, the first in row {_first_row(~finite)}. "
            "The teacher gave them: load it in float32 (--teacher_dtype float32)."
        )
    if codec == "int8":
        scales = values.abs().amax(-1) / _STEPS if values.numel() else values.new_zeros(len(values))
        scales = scales.masked_fill(scales < _SMALLEST_SCALE, 0.0)
        divisors = scales.masked_fill(scales == 0, float("inf"))  # a row of zeros stays one
        steps = (values / divisors[..., None]).round().clamp(-_STEPS, _STEPS)  # halves to the even step
        return {"values": steps.to(dtype), "scales": scales}
    stored = values.to(dtype)
    too_large = stored.isinf()
    if bool(too_large.any()):
        raise CacheError(
            f"{int(too_large.sum())} values are too large for {codec}, whose largest is {torch.finfo(dtype).max:g}; the first is "
            f"{values[too_large][0].item():g}, in row {_first_row(too_large)}. Use --teacher_cache_dtype "
            f"{'bfloat16 or int8' if codec == 'float16' else 'float32 or int8'}."
        )
    return {"values": stored}


def decode(parts: Mapping[str, Tensor], codec: CodecName) -> Tensor:
    """Values as a loss reads them: (rows, width); int8 as float32, the others in their own dtype.

    Raises:
        CacheError: the parts are not those of the codec.
        ArgumentError: no such codec.
    """
    dtype = _dtype(codec)
    expected = {"values", "scales"} if codec == "int8" else {"values"}
    if set(parts) != expected or parts["values"].dtype != dtype:
        found = ", ".join(f"{name} ({tensor.dtype})".replace("torch.", "") for name, tensor in sorted(parts.items())) or "nothing"
        raise CacheError(f"Values stored as {codec} have the parts {', '.join(sorted(expected))}, the values in {codec}; found {found}.")
    if codec == "int8":
        return parts["values"].float() * parts["scales"][..., None]
    return parts["values"]


def codec_error(values: Tensor, codec: CodecName) -> Tensor:
    """(rows,) squared error of writing `values` (rows, width) and reading them; infinite where some are too large for the codec.

    Raises:
        ArgumentError: no such codec.
    """
    try:
        read = decode(encode(values, codec), codec)
    except CacheError:
        return torch.full((len(values),), float("inf"))
    return (read.float() - values).square().sum(1)


def _dtype(codec: str) -> torch.dtype:
    if codec not in _DTYPES:
        near = get_close_matches(str(codec), list(_DTYPES), n=1, cutoff=0.5)
        hint = f" Did you mean {near[0]!r}?" if near else ""
        raise ArgumentError(f"Values cannot be stored as {codec!r}.{hint} Known: {', '.join(CODEC_NAMES)}.")
    return _DTYPES[codec]


def _first_row(bad: Tensor) -> int:
    return int(bad.reshape(len(bad), -1).any(-1).int().argmax())
