"""Where a live teacher stands, and what is refused before it is moved."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from hf_compress.arguments import CompressionArguments
from hf_compress.errors import ArgumentError, TeacherError
from hf_compress.signals import SignalSpec
from hf_compress.teacher import LiveTeacher
from hf_compress.teacher_placement import check_sharding, free_bytes, placed, refuse_split, refuse_too_large
from hf_compress.trainer import DistillTrainer
from hf_compress.training_arguments import DistillTrainingArguments
from tests.tiny_models import tiny_batch, tiny_model
from tests.tiny_runs import arguments, rows, student, teacher

GPU = torch.device("cuda", 0)


def size_of(model: torch.nn.Module) -> int:
    return sum(each.numel() * each.element_size() for each in (*model.parameters(), *model.buffers()))


def test_a_teacher_that_does_not_fit_is_refused_with_the_ways_out() -> None:
    needed = size_of(teacher()) + size_of(student())
    refuse_too_large(teacher(), student(), GPU, needed)
    with pytest.raises(TeacherError) as refused:
        refuse_too_large(teacher(), student(), GPU, needed - 1)
    for words in (
        "weights take 39.2 kB, the student's 23.6 kB",
        "cuda:0 has 62.8 kB left",
        "--teacher_dtype bfloat16",
        "--teacher_cache_dir",
        "--teacher_sharded",
    ):
        assert words in str(refused.value)
    refuse_too_large(teacher(), student(), torch.device("cpu"), 0)  # both are there already
    refuse_too_large(teacher(), student(), GPU, None)
    assert free_bytes(torch.device("cpu")) is None


def test_tied_weights_count_once() -> None:
    tied = tiny_model("gpt2", head="causal_lm")
    assert tied.lm_head.weight is tied.transformer.wte.weight
    refuse_too_large(tied, torch.nn.Module(), GPU, size_of(tied))


@pytest.mark.gpu
def test_what_torch_holds_without_using_it_is_free() -> None:
    device = torch.device("cuda")
    before = free_bytes(device)
    block = torch.empty(1 << 28, dtype=torch.uint8, device=device)
    held = free_bytes(device)
    del block
    after = free_bytes(device)
    assert before is not None and held is not None and after is not None
    assert before - held >= 1 << 28 and after - held >= 1 << 28


def test_a_teacher_takes_pixels_in_the_students_type() -> None:
    vit = tiny_model("vit")
    pixels = tiny_batch(vit)["pixel_values"]
    spec = SignalSpec(logits=True)
    full, cast = (LiveTeacher(vit).signals({"pixel_values": each}, spec).logits["logits"] for each in (pixels, pixels.bfloat16()))
    assert cast.dtype == torch.float32
    assert torch.allclose(full, cast, atol=0.05) and not torch.equal(full, cast)


def test_a_teacher_is_split_only_where_zero_3_can(tmp_path: Path) -> None:
    teacher().save_pretrained(tmp_path / "teacher")
    flags = CompressionArguments(teacher_model_name_or_path=str(tmp_path / "teacher"), teacher_sharded=True)
    with pytest.raises(ArgumentError, match=r"--teacher_sharded splits .* this run has none. Add --deepspeed zero3"):
        DistillTrainer(student(), arguments(tmp_path / "out"), compression=flags, train_dataset=rows())
    flags = CompressionArguments(teacher_sharded=True)
    with pytest.raises(ArgumentError, match="--teacher_sharded would have no effect"):
        DistillTrainer(student(), arguments(tmp_path / "out"), teacher=teacher(), compression=flags, train_dataset=rows())
    with pytest.raises(ArgumentError, match="teacher_sharded is 'half'; expected true or false"):
        CompressionArguments(teacher_sharded="half")  # type: ignore[arg-type]
    check_sharding(False, goes_to_disk=True)


def test_a_split_teacher_without_zero_3_and_one_that_is_to_be_stored() -> None:
    split: Any = teacher()
    for number, parameter in enumerate(split.parameters()):
        parameter.ds_id = number  # by this DeepSpeed marks them
    with pytest.raises(TeacherError, match=r"split up by ZeRO-3, and this run has no config of ZeRO-3"):
        placed(LiveTeacher(split), student(), torch.device("cpu"))
    with pytest.raises(TeacherError, match=r"shape \(0,\).*Give its path instead of the model"):
        refuse_split(split)
    refuse_split(teacher())
    refuse_split(None)


def test_a_config_that_deepspeed_would_refuse_is_refused_before_anything_is_loaded(tmp_path: Path) -> None:
    removed = {"compression_training": {"layer_reduction": {"keep_number_layer": 2, "teacher_layer": [0, 3]}}}
    with pytest.raises(ArgumentError, match="--layers_to_keep 1,4"):
        DistillTrainingArguments(output_dir=str(tmp_path), deepspeed=removed)
    with pytest.raises(ArgumentError, match="--layers_to_keep 1,4"):
        DistillTrainer(student(), SimpleNamespace(deepspeed=removed), teacher="/nowhere")
