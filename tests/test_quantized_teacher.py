"""A teacher in 8 bit, handed over as an object: torch's own dynamic int8, which runs on the CPU; and what libraries forbid to move."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from hf_compress.cache.reader import TeacherCache
from hf_compress.errors import CacheError, TeacherError
from hf_compress.losses.hidden_states import HiddenStatesLoss
from hf_compress.losses.logits import LogitsLoss
from hf_compress.teacher_identity import weights_hash
from hf_compress.trainer import DistillTrainer
from tests.cached_runs import MAP, data, refused, run, tokenizer
from tests.tiny_models import tiny_model
from tests.tiny_runs import arguments, every_loss, largest_difference, student, teacher, weights


def int8(model: Any) -> Any:
    """The model, its linear layers in int8."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        quantized = torch.ao.quantization.quantize_dynamic(model, {nn.Linear}, dtype=torch.qint8)
    assert "DynamicQuantizedLinear" in repr(quantized)
    return quantized


def trained(folder: Path, guide: Any) -> DistillTrainer:
    args = arguments(folder, max_steps=3, per_device_train_batch_size=8, learning_rate=0.05)
    more = {"train_dataset": data(), "processing_class": tokenizer()}
    trainer = DistillTrainer(student(), args, teacher=guide, losses=every_loss(), **more)
    trainer.train()
    return trainer


def test_an_int8_teacher_teaches_nearly_as_the_float32_one(tmp_path: Path) -> None:
    start = {name: parameter.detach() for name, parameter in student().named_parameters()}
    plain, quantized = trained(tmp_path / "a", teacher()), trained(tmp_path / "b", int8(teacher()))
    moved = largest_difference(weights(plain), start)
    assert 0 < largest_difference(weights(plain), weights(quantized)) < 0.05 * moved


def test_an_int8_teacher_on_disk(tmp_path: Path) -> None:
    chosen = {"losses": [LogitsLoss(), HiddenStatesLoss(MAP)]}
    args = arguments(tmp_path / "live", per_device_train_batch_size=4)
    live = DistillTrainer(student(), args, teacher=int8(teacher()), train_dataset=data(), processing_class=tokenizer(), **chosen)
    live.train()
    built = run(tmp_path, int8(teacher()), teacher_cache_dtype="float32", **chosen)
    # Not to the last bit: torch's int8 takes its scales from the whole batch, and what is stored was asked in other batches.
    assert largest_difference(weights(live), weights(built)) < 1e-3
    assert largest_difference(weights(live), dict(student().named_parameters())) > 2e-2
    run(tmp_path, int8(teacher()), **chosen)  # the same weights in another object
    stored = TeacherCache(tmp_path / "cache").manifest.teacher.weights
    assert stored == weights_hash(int8(teacher()).state_dict().items())
    refused(tmp_path, CacheError, "teacher.weights", stored, guide=int8(tiny_model("bert", num_layers=4, seed=9)), **chosen)
    refused(tmp_path, CacheError, "teacher.weights", stored, guide=teacher(), **chosen)


def test_weights_that_do_not_show_their_numbers() -> None:
    with pytest.raises(TeacherError, match=r"layer\.weight .* does not show its numbers.*leave --teacher_cache_dir out"):
        weights_hash([("layer.weight", torch.zeros(2, 2, device="meta"))])


@pytest.mark.parametrize("sign", [{"is_quantized": True}, {"hf_device_map": {"": 0}}])
def test_a_quantized_or_spread_out_teacher_is_never_moved(sign: dict[str, Any], tmp_path: Path) -> None:
    """Models of bitsandbytes, and those that accelerate has spread over devices, raise in `.to`."""
    guide = teacher()
    for name, value in sign.items():
        setattr(guide, name, value)

    def refuse(*args: Any, **kwargs: Any) -> nn.Module:
        raise ValueError("`.to` is not supported for quantized models")

    guide.to = refuse  # type: ignore[method-assign, assignment]
    assert trained(tmp_path, guide).state.global_step == 3
