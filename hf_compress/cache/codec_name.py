"""The names of the number formats that values are stored in; `codec` says what each of them is. No torch here."""

from __future__ import annotations

from typing import Literal, get_args

CodecName = Literal["float32", "float16", "bfloat16", "int8"]
CODEC_NAMES: tuple[CodecName, ...] = get_args(CodecName)
# The smallest whose student scores as well as float32's (benchmarks/results/minimum_knowledge.md).
DEFAULT_CODEC: CodecName = "int8"
