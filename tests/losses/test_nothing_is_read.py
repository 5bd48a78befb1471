"""No loss reads a value back from the device: on the meta device, whose tensors have shapes and no values, that would be an error."""

from __future__ import annotations

import pytest
import torch

from hf_compress.losses.loss import Loss
from hf_compress.losses.recipes import LOSSES
from hf_compress.losses.reduction import Batch
from hf_compress.signals import Signals, SignalSpec
from hf_compress.task import ModelShape, Stack

BATCH, TOKENS, HEADS = 2, 5, 2
STUDENT = ModelShape("Student", "sequence_classification", {"layers": Stack(2, 8, HEADS)})
TEACHER = ModelShape("Teacher", "sequence_classification", {"layers": Stack(4, 16, HEADS)})


def shown(spec: SignalSpec, shape: ModelShape, loss: Loss, *, learns: bool) -> Signals:
    def tensor(*sizes: int) -> torch.Tensor:
        return torch.empty(sizes, device="meta", requires_grad=learns)

    width = {key: loss.projections[key.projection].out_features for key in spec.hidden_states if key.projection}
    stack = shape.stacks["layers"]
    return Signals(
        logits={"logits": tensor(BATCH, 3)} if spec.logits else {},
        hidden_states={key: tensor(BATCH, TOKENS, width.get(key, stack.hidden_size)) for key in spec.hidden_states},
        attention_scores={key: tensor(BATCH, HEADS, TOKENS, TOKENS) for key in spec.attention_scores},
        attention_vectors={
            key: tensor(BATCH, stack.vectors(key.kind)[0], TOKENS, stack.vectors(key.kind)[1]) for key in spec.attention_vectors
        },
    )


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("name", [name for name in LOSSES if name != "labels"])
def test_a_step_of_a_loss_needs_no_value(name: str, causal: bool) -> None:
    mask = torch.empty(BATCH, TOKENS, dtype=torch.bool, device="meta")
    stacks = frozenset({"layers"} if causal else ())
    batch = Batch("sequence_classification", BATCH, {"layers": mask}, causal_stacks=stacks, summary_last=stacks, device=mask.device)
    for loss in LOSSES[name](None).resolve(STUDENT, TEACHER):  # type: ignore[index]
        student = shown(loss.student_spec(), STUDENT, loss, learns=True)
        value = loss(student, shown(loss.teacher_spec(), TEACHER, loss, learns=False), batch)
        (value / batch.count(loss.unit)).backward()
        assert value.shape == () and value.device.type == "meta"
        assert all(tensor.grad is not None for tensor in student.named_tensors().values())


def test_reading_would_be_noticed() -> None:
    with pytest.raises(RuntimeError, match="meta"):
        torch.empty((), device="meta").item()
    with pytest.raises(NotImplementedError):
        torch.empty(2, device="meta")[torch.empty(2, dtype=torch.bool, device="meta")]
