"""The learnt maps from the student's width to the teacher's: part of the student while it trains, no part of what it is saved as."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from hf_compress.errors import TeacherError
from hf_compress.losses.loss import Projection

ATTRIBUTE = "hf_compress_projections"
FILE_NAME = "distill_projections.safetensors"
# Where a model of transformers keeps the names of weights that save_pretrained leaves out.
IGNORED = "_keys_to_ignore_on_save"


class Projections(nn.ModuleDict):
    """Linear maps by name, attached to a student."""

    @classmethod
    def attach(cls, student: nn.Module, wanted: Mapping[str, Projection]) -> Projections:
        """Make the maps part of the student, so that its optimizer, its DDP and its engine know them.

        Args:
            student: the model to train, on its device.
            wanted: their widths by name; a map of that width that the student already has is kept as it is.
        """
        present = getattr(student, ATTRIBUTE, None)
        projections = present if isinstance(present, Projections) else cls()
        like = next(parameter for parameter in student.parameters() if parameter.is_floating_point())
        for name, size in sorted(wanted.items()):
            present_map = dict(projections.items()).get(name)
            if not isinstance(present_map, nn.Linear) or present_map.weight.shape != (size.out_features, size.in_features):
                projections[name] = nn.Linear(size.in_features, size.out_features).to(like.device, like.dtype)
        if len(projections):
            setattr(student, ATTRIBUTE, projections)
            # Resuming from a folder without them does not complain either.
            ignored = set(getattr(student, IGNORED, None) or ())
            setattr(student, IGNORED, ignored | {f"{ATTRIBUTE}.{name}" for name in projections.state_dict()})
        return projections

    def project(self, name: str, state: Tensor) -> Tensor:
        """(batch, tokens, student's width) -> (batch, tokens, teacher's width)."""
        projected: Tensor = self[name](state)
        return projected

    def save(self, folder: str | Path, *, write: bool = True) -> None:
        """Write the maps beside a checkpoint; all processes call it, since under ZeRO-3 each holds a part, and one writes."""
        with _gathered(self):
            if write:
                save_file(
                    {name: tensor.detach().cpu().contiguous() for name, tensor in self.state_dict().items()}, Path(folder) / FILE_NAME
                )

    def load(self, folder: str | Path) -> None:
        """Read the maps back when a run is resumed.

        Raises:
            TeacherError: if the checkpoint holds other maps than this run needs.
        """
        path = Path(folder) / FILE_NAME
        stored = load_file(path) if path.is_file() else {}
        wanted = {name: tuple(tensor.shape) for name, tensor in self.state_dict().items()}
        found = {name: tuple(tensor.shape) for name, tensor in stored.items()}
        if wanted != found:
            raise TeacherError(
                f"The checkpoint {folder} was trained with the projections {found or 'none'}, but this run needs {wanted}. "
                "Resume with the teacher, the recipe and the layer map of the first run, or start afresh."
            )
        with _gathered(self):
            self.load_state_dict(stored)


@contextmanager
def _gathered(module: nn.Module) -> Iterator[None]:
    """Under ZeRO-3 a parameter is whole only inside this block."""
    parameters = list(module.parameters())
    if not any(hasattr(parameter, "ds_id") for parameter in parameters):
        yield
        return
    import deepspeed

    with deepspeed.zero.GatheredParameters(parameters, modifier_rank=0):
        yield
