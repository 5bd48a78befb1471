"""The learnt maps from the student's width to the teacher's: part of the student while it trains, no part of what it is saved as.

They are saved beside it, and a student that is loaded from there learns on with them: TinyBERT's general distillation hands its
projection on to the task, as it hands on the student.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

from hf_compress.errors import TeacherError
from hf_compress.layers.stack import pretrained_model
from hf_compress.losses.loss import Projection
from hf_compress.projection_file import FILE_NAME, read_models, read_projections, write_projections

logger = logging.getLogger(__name__)

ATTRIBUTE = "hf_compress_projections"
# Where a model of transformers keeps the names of weights that save_pretrained leaves out.
IGNORED = "_keys_to_ignore_on_save"


class Projections(nn.ModuleDict):
    """Linear maps by name, attached to a student.

    Attributes:
        models: between which models they are learnt, as `projection_file` writes it.
    """

    models: dict[str, str]

    @classmethod
    def attach(cls, student: nn.Module, wanted: Mapping[str, Projection], *, teacher: str = "") -> Projections:
        """Make the maps part of the student, so that its optimizer, its DDP and its engine know them.

        Args:
            student: the model to train, on its device.
            wanted: their widths by name; a map of that width that the student already has is kept as it is, and one that lies in the
                folder that the student was loaded from is where a new one starts.
            teacher: its `model_type`; empty where that is not known.

        Raises:
            TeacherError: what lies there was learnt between other models.
        """
        present = getattr(student, ATTRIBUTE, None)
        projections = present if isinstance(present, Projections) else cls()
        projections.models = _between(student, teacher, wanted)
        floating = [parameter for parameter in student.parameters() if parameter.is_floating_point()]
        # Of the type of what is trained: PEFT trains adapters in float32 on a base in bfloat16, where small steps would be lost.
        like = next((parameter for parameter in floating if parameter.requires_grad), floating[0])
        new = []
        for name, size in sorted(wanted.items()):
            present_map = dict(projections.items()).get(name)
            if not _is_of(size, present_map):
                projections[name] = nn.Linear(size.in_features, size.out_features, bias=size.bias).to(like.device, like.dtype)
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
            tensors = {name: _whole(tensor) for name, tensor in self.state_dict().items()}
            if write and len(self):
                write_projections(folder, tensors, self.models)
            elif write:
                (Path(folder) / FILE_NAME).unlink(missing_ok=True)

    @contextmanager
    def left_out(self, student: nn.Module) -> Iterator[None]:
        """While a student is saved that transformers split as it was loaded: what it gathers then is all that is attached."""
        if not len(self) or not getattr(student, "is_distributed_loading_by_transformers", False):
            yield
            return
        delattr(student, ATTRIBUTE)
        try:
            yield
        finally:
            setattr(student, ATTRIBUTE, self)

    def load(self, folder: str | Path) -> None:
        """Read the maps back, when a run is resumed or its best step is; nothing where there are none.

        Raises:
            TeacherError: if the checkpoint holds other maps than this run needs.
        """
        if not len(self):
            return
        stored = read_projections(folder)
        wanted = {name: tuple(tensor.shape) for name, tensor in self.state_dict().items()}
        found = {name: tuple(tensor.shape) for name, tensor in stored.items()}
        if wanted != found:
            raise TeacherError(
                f"The checkpoint {folder} was trained with the projections {found or 'none'}, but this run needs {wanted}. "
                "Resume with the teacher, the recipe and the layer map of the first run, or start afresh."
            )
        with _gathered(self), torch.no_grad():
            for name, tensor in self.state_dict().items():
                tensor.copy_(_as_split(stored[name].to(tensor.device), tensor))

    def _start_from(self, folder: Path | None, names: Sequence[str]) -> None:
        """Give new maps the weights that lie beside the student, where name and shape agree; say what became of each."""
        stored = read_projections(folder) if folder is not None and names else {}
        learnt_between = read_models(folder) if folder is not None and stored else {}
        for name in names if stored else ():
            own = {f"{name}.{key}": tensor for key, tensor in self[name].state_dict().items()}
            if all(key in stored and stored[key].shape == tensor.shape for key, tensor in own.items()):
                self._refuse_other_models(folder, learnt_between)
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

    def _refuse_other_models(self, folder: Path | None, learnt: Mapping[str, str]) -> None:
        for which in ("student", "teacher"):
            before, now = learnt.get(which), self.models.get(which)
            if before and now and before != now:
                raise TeacherError(
                    f"{FILE_NAME} in {folder} was learnt with a {which} of the kind {before}, and the {which} of this run is a {now}: it "
                    f"would start from what another model needs. Delete that file, and the projections start anew, or take that {which}."
                )


def _between(student: nn.Module, teacher: str, wanted: Mapping[str, Projection]) -> dict[str, str]:
    widths = next(((size.in_features, size.out_features) for size in wanted.values()), (0, 0))
    found = {"student": str(pretrained_model(student).config.model_type), "teacher": teacher}
    sizes = {"student_hidden_size": str(widths[0]), "teacher_hidden_size": str(widths[1])}
    return {name: value.removeprefix("pruned_") for name, value in (found | sizes).items() if value not in ("", "0")}


def _is_of(size: Projection, found: nn.Module | None) -> bool:
    """Whether a map is of that size."""
    if not isinstance(found, nn.Linear) or found.weight.shape != (size.out_features, size.in_features):
        return False
    return (found.bias is not None) == size.bias


def loaded_from(student: nn.Module) -> Path | None:
    """The folder on this machine that a student was loaded from; None where it was built from a config, or came from the hub."""
    path = str(getattr(pretrained_model(student).config, "_name_or_path", None) or "")
    return Path(path) if path and Path(path).is_dir() else None


def _whole(tensor: Tensor) -> Tensor:
    """FSDP's part of a parameter made whole, by all processes together."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def _as_split(whole: Tensor, like: Tensor) -> Tensor:
    """This process's part of it, where FSDP has split the parameter."""
    return distribute_tensor(whole, like.device_mesh, like.placements) if isinstance(like, DTensor) else whole


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
