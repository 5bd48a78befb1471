"""The dimensions that all tokens of a layer share: chosen once, stored once, the same for teacher and student.

shared.safetensors     hidden_states.layers.9.indices              random, uniform
                       hidden_states.layers.9.mean, .components    pca
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load, save
from torch import Tensor

from hf_compress.cache.files import write_atomic
from hf_compress.cache.key import Integers
from hf_compress.cache.manifest import SHARED_FILE
from hf_compress.cache.selection import Selection
from hf_compress.cache.widths import pca_basis, random_dimensions, uniform_dimensions
from hf_compress.errors import CacheError
from hf_compress.selected_state import SharedDimensions, Space, Subspace

# What a basis is learnt on: the examples with the smallest keys, as good as drawn at random and the same for everybody; so many at most,
# and no more when they have so many selected tokens.
SAMPLE_EXAMPLES = 512
SAMPLE_TOKENS = 16384


def make_spaces(selection: Selection, hidden_sizes: Mapping[str, int], sample: Mapping[str, Tensor]) -> dict[str, Space]:
    """Choose the shared dimensions of each field.

    Args:
        selection: its width scheme; none is shared under "all" and "magnitude".
        hidden_sizes: by field.
        sample: by field, (tokens, hidden), selected tokens of a sample of examples; read for pca only.
    """
    spaces: dict[str, Space] = {}
    zero_target = selection.mask == "zero_target"
    for field, hidden in hidden_sizes.items():
        count = selection.num_dimensions(hidden)
        if selection.width_scheme == "random":
            spaces[field] = SharedDimensions(random_dimensions(hidden, count, selection.seed), zero_target)
        elif selection.width_scheme == "uniform":
            spaces[field] = SharedDimensions(uniform_dimensions(hidden, selection.width), zero_target)
        elif selection.width_scheme == "pca":
            spaces[field] = pca_basis(sample[field], count)
    return spaces


def blank_spaces(selection: Selection, hidden_sizes: Mapping[str, int]) -> dict[str, Space]:
    """Shared dimensions of the right shapes, before they are chosen: which ones they are takes no part in how many bytes they are."""
    spaces: dict[str, Space] = {}
    for field, hidden in hidden_sizes.items():
        count = selection.num_dimensions(hidden)
        if selection.width_scheme in ("random", "uniform"):
            spaces[field] = SharedDimensions(torch.arange(count), selection.mask == "zero_target")
        elif selection.width_scheme == "pca":
            spaces[field] = Subspace(torch.zeros(hidden), torch.zeros(hidden, count))
    return spaces


def spaces_bytes(spaces: Mapping[str, Space]) -> int:
    """What they take on disk, but for the header."""
    held: list[int] = []

    def count(tensor: Tensor) -> Tensor:
        held.append(tensor.nbytes)
        return tensor

    for space in spaces.values():
        space.moved(count)
    return sum(held)


def sample_size(lengths: Integers, selection: Selection) -> int:
    """How many examples make a sample.

    Args:
        lengths: (examples,) tokens, in the order of keys.
        selection: how many of them are selected.
    """
    drawn = lengths[:SAMPLE_EXAMPLES]
    tokens = np.cumsum(drawn if selection.tokens is None else np.minimum(drawn, selection.tokens))
    return min(len(drawn), int((tokens < SAMPLE_TOKENS).sum()) + 1)


def sampled_tokens(lengths: Integers, choosable: Integers) -> Callable[[int | None], int]:
    """How many tokens the sample for a basis has, by how many of each example are kept, None for all.

    Args:
        lengths: (examples,) tokens, in the order of keys.
        choosable: (examples,) from how many of them it is chosen.
    """

    @cache
    def sampled(tokens: int | None) -> int:
        selection = Selection() if tokens is None else Selection(tokens=tokens, length="left_first")
        kept = lengths if tokens is None else np.minimum(choosable, tokens)
        return int(kept[: sample_size(lengths, selection)].sum())

    return sampled


def needs_sample(selection: Selection) -> bool:
    """Whether `make_spaces` looks at hidden states."""
    return selection.width_scheme == "pca"


def write_spaces(folder: Path, spaces: Mapping[str, Space]) -> None:
    """Write them, whole or not at all; no file where there are none."""
    if not spaces:
        return
    write_atomic(folder / SHARED_FILE, save(_tensors_of(spaces)))


def spaces_file_bytes(spaces: Mapping[str, Space]) -> int:
    """The size of the file that `write_spaces` makes."""
    return len(save(_tensors_of(spaces))) if spaces else 0


def _tensors_of(spaces: Mapping[str, Space]) -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = {}
    for field, space in spaces.items():
        if isinstance(space, SharedDimensions):
            tensors[f"{field}.indices"] = space.indices
        elif isinstance(space, Subspace):
            tensors |= {f"{field}.mean": space.mean, f"{field}.components": space.components.contiguous()}
    return tensors


def read_spaces(folder: Path, selection: Selection) -> dict[str, Space]:
    """Read them back; none where there is no file.

    Raises:
        CacheError: if the file cannot be read, or holds something else.
    """
    if not (folder / SHARED_FILE).exists():
        return {}
    try:
        tensors = load((folder / SHARED_FILE).read_bytes())
    except Exception as error:  # the library raises several kinds, among them a bare Exception of its own
        raise CacheError(f"{folder / SHARED_FILE} cannot be read: {error}. The cache is damaged; build it again.") from error
    spaces: dict[str, Space] = {}
    for field in sorted({name.rpartition(".")[0] for name in tensors}):
        if f"{field}.indices" in tensors:
            spaces[field] = SharedDimensions(tensors[f"{field}.indices"], selection.mask == "zero_target")
        elif f"{field}.mean" in tensors and f"{field}.components" in tensors:
            spaces[field] = Subspace(tensors[f"{field}.mean"], tensors[f"{field}.components"])
        else:
            raise CacheError(f"{folder / SHARED_FILE} holds neither indices nor a basis for {field}. The cache is damaged; build it again.")
    return spaces
