"""The dimensions that all tokens of a layer share: chosen once, stored once, the same for teacher and student.

shared.safetensors     hidden_states.layers.9.indices              random, uniform
                       hidden_states.layers.9.mean, .components    pca
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from safetensors.torch import load, save
from torch import Tensor

from hf_compress.cache.files import write_atomic
from hf_compress.cache.manifest import SHARED_FILE
from hf_compress.cache.selection import Selection
from hf_compress.cache.widths import PcaBasis, random_dimensions, uniform_dimensions
from hf_compress.errors import CacheError
from hf_compress.selected_state import SharedDimensions, Space, Subspace


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
            basis = PcaBasis.fit(sample[field], count)
            spaces[field] = Subspace(basis.mean.float(), basis.components.float())
    return spaces


def needs_sample(selection: Selection) -> bool:
    """Whether `make_spaces` looks at hidden states."""
    return selection.width_scheme == "pca"


def write_spaces(folder: Path, spaces: Mapping[str, Space]) -> None:
    """Write them, whole or not at all; no file where there are none."""
    if not spaces:
        return
    tensors: dict[str, Tensor] = {}
    for field, space in spaces.items():
        if isinstance(space, SharedDimensions):
            tensors[f"{field}.indices"] = space.indices
        elif isinstance(space, Subspace):
            tensors |= {f"{field}.mean": space.mean, f"{field}.components": space.components.contiguous()}
    write_atomic(folder / SHARED_FILE, save(tensors))


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
