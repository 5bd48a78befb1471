"""The learnt maps from the student's width to the teacher's: part of the student while it trains, no part of what it is saved as.

They are saved beside it, and a student that is loaded from there learns on with them: TinyBERT's general distillation hands its
projection on to the task, as it hands on the student.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

from torch import Tensor, nn

from hf_compress.errors import TeacherError
from hf_compress.layers.stack import pretrained_model
from hf_compress.losses.loss import Projection
from hf_compress.projection_file import FILE_NAME, read_projections, write_projections

logger = logging.getLogger(__name__)

ATTRIBUTE = "hf_compress_projections"
# Where a model of transformers keeps the names of weights that save_pretrained leaves out.
IGNORED = "_keys_to_ignore_on_save"


class Projections(nn.ModuleDict):
    """Linear maps by name, attached to a student."""

    @classmethod
    def attach(cls, student: nn.Module, wanted: Mapping[str, Projection]) -> Projections:
        """Make the maps part of the student, so that its optimizer, its DDP and its engine know them.

        Args:
            student: the model to train, on its device.
            wanted: their widths by name; a map of that width that the student already has is kept as it is, and one that lies in the
                folder that the student was loaded from is where a new one starts.
        """
        present = getattr(student, ATTRIBUTE, None)
        projections = present if isinstance(present, Projections) else cls()
        floating = [parameter for parameter in student.parameters() if parameter.is_floating_point()]
        # Of the type of what is trained: PEFT trains adapters in float32 on a base in bfloat16, where small steps would be lost.
        like = next((parameter for parameter in floating if parameter.requires_grad), floating[0])
        new = []
        for name, size in sorted(wanted.items()):
            present_map = dict(projections.items()).get(name)
            if not isinstance(present_map, nn.Linear) or present_map.weight.shape != (size.out_features, size.in_features):
                projections[name] = nn.Linear(size.in_features, size.out_features).to(like.device, like.dtype)
                new.append(name)
        projections._start_from(loaded_from(student), new)
        if len(projections):
            setattr(student, ATTRIBUTE, projections)
            # Resuming from a folder without them does not complain either.
            ignored = set(getattr(student, IGNORED, None) or ())
            setattr(student, IGNORED, ignored | {f"{ATTRIBUTE}.{name}" for name in projections.state_dict()})
        return projections

    def project(self, name: str, state: Tensor) -> Tensor:
        """(batch, tokens, student's width) -> (batch, tokens, teacher's width)."""
        linear = self[name]
        assert isinstance(linear, nn.Linear)
        projected: Tensor = linear(state.to(linear.weight.dtype))
        return projected

    def save(self, folder: str | Path, *, write: bool = True) -> None:
        """Write the maps beside a checkpoint; all processes call it, since under ZeRO-3 each holds a part, and one writes.

        Where there are none, a file that an earlier run left there is taken away: the next run would start from it.
        """
        with _gathered(self):
            if write and len(self):
                write_projections(folder, self.state_dict())
            elif write:
                (Path(folder) / FILE_NAME).unlink(missing_ok=True)

    def load(self, folder: str | Path) -> None:
        """Read the maps back when a run is resumed.

        Raises:
            TeacherError: if the checkpoint holds other maps than this run needs.
        """
        stored = read_projections(folder)
        wanted = {name: tuple(tensor.shape) for name, tensor in self.state_dict().items()}
        found = {name: tuple(tensor.shape) for name, tensor in stored.items()}
        if wanted != found:
            raise TeacherError(
                f"The checkpoint {folder} was trained with the projections {found or 'none'}, but this run needs {wanted}. "
                "Resume with the teacher, the recipe and the layer map of the first run, or start afresh."
            )
        with _gathered(self):
            self.load_state_dict(stored)

    def _start_from(self, folder: Path | None, names: Sequence[str]) -> None:
        """Give new maps the weights that lie beside the student, where name and shape agree; say what became of each."""
        stored = read_projections(folder) if folder is not None and names else {}
        for name in names if stored else ():
            own = {f"{name}.{key}": tensor for key, tensor in self[name].state_dict().items()}
            if all(key in stored and stored[key].shape == tensor.shape for key, tensor in own.items()):
                self[name].load_state_dict({key.removeprefix(f"{name}."): stored[key] for key in own})
                logger.info("projection %s: starts from %s in %s", name, FILE_NAME, folder)
                continue
            wanted, found = own[f"{name}.weight"].shape, {key: tuple(each.shape) for key, each in stored.items() if each.dim() == 2}
            logger.info(
                "projection %s: starts anew; it is %d -> %d here, and %s in %s holds %s",
                name,
                wanted[1],
                wanted[0],
                FILE_NAME,
                folder,
                ", ".join(f"{key.removesuffix('.weight')} ({shape[1]} -> {shape[0]})" for key, shape in found.items()) or "none",
            )


def loaded_from(student: nn.Module) -> Path | None:
    """The folder on this machine that a student was loaded from; None where it was built from a config, or came from the hub."""
    path = str(getattr(pretrained_model(student).config, "_name_or_path", None) or "")
    return Path(path) if path and Path(path).is_dir() else None


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
