"""The flags: what they mean, what they refuse, and that three doors (HfArgumentParser, a file, Python) give the same."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import HfArgumentParser, Seq2SeqTrainingArguments, TrainingArguments

from hf_compress.arguments import FIELDS, CompressionArguments, Phase
from hf_compress.errors import ArgumentError
from hf_compress.training_arguments import DistillTrainingArguments, Seq2SeqDistillTrainingArguments


def test_nothing_given_wants_nothing() -> None:
    arguments = CompressionArguments()
    assert not arguments.wants_layer_drop
    assert not arguments.wants_freezing
    assert not arguments.wants_distillation
    assert (arguments.kept, arguments.dropped, arguments.frozen) == (None, None, ())
    assert (arguments.weights, arguments.phases, arguments.layer_map, arguments.trim_padding) == ({}, (), None, None)


@pytest.mark.parametrize("text", ["5-8", "5,6,7,8", "8, 5-7", "5 6 7 8", [8, 7, 6, 5]])
def test_layers_are_ranges_numbers_or_a_list(text: str | list[int]) -> None:
    assert CompressionArguments(layers_to_drop=text).dropped == (5, 6, 7, 8)
    assert CompressionArguments(layers_to_keep=text).kept == (5, 6, 7, 8)
    assert CompressionArguments(layers_to_freeze=text).frozen == (5, 6, 7, 8)


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"layer_drop_strategy": "symetric"}, ["layer_drop_strategy", "Did you mean 'symmetric'?", "alternate_odd"]),
        ({"layer_drop_stack": "encodr"}, ["Did you mean 'encoder'?"]),
        ({"distill_recipe": "tinybret"}, ["Did you mean 'tinybert'?"]),
        ({"teacher_dtype": "float8"}, ["teacher_dtype", "float16"]),
        ({"layers_to_drop": "0-2"}, ["no layer 0", "counted from 1"]),
        ({"layers_to_keep": [0]}, ["no layer 0"]),
        ({"layers_to_freeze": "0"}, ["layers_to_freeze", "no layer 0"]),
        ({"layers_to_drop": "8-5"}, ["backwards", "5-8"]),
        ({"layers_to_drop": "1,2,2"}, ["layer 2 twice"]),
        ({"layers_to_drop": "five"}, ["'five'", "counted from 1"]),
        ({"layers_to_drop": ""}, ["no layer"]),
        ({"layers_to_drop": "-1"}, ["'-1'"]),
        ({"num_layers_to_drop": 0, "layer_drop_strategy": "top"}, ["num_layers_to_drop is 0", "at least 1"]),
        ({"num_layers_to_drop": "two", "layer_drop_strategy": "top"}, ["'two'", "number"]),
        ({"num_layers_to_drop": 2}, ["no --layer_drop_strategy"]),
        ({"num_layers_to_drop": 2, "layers_to_drop": "1,2"}, ["--layers_to_drop says already"]),
        ({"layer_drop_strategy": "top", "layers_to_drop": "1"}, ["--layer_drop_strategy and --layers_to_drop", "one of them"]),
        ({"layers_to_keep": "2", "layers_to_drop": "1"}, ["--layers_to_drop and --layers_to_keep"]),
        ({"layer_drop_threshold": 0.9}, ["contribution"]),
        ({"layer_drop_threshold": 0.9, "layer_drop_strategy": "top"}, ["contribution"]),
        ({"layer_drop_threshold": 1.5, "layer_drop_strategy": "contribution"}, ["between 0 and 1"]),
        ({"layer_drop_threshold": 0.9, "num_layers_to_drop": 2, "layer_drop_strategy": "contribution"}, ["contradict"]),
        ({"layer_drop_stack": "encoder"}, ["no layers are dropped"]),
        ({"distill_temperature": 0}, ["above 0"]),
        ({"distill_temperature": "warm"}, ["'warm'"]),
        ({"distill_skip_heads": 1.5}, ["between 0 and 1"]),
        ({"distill_weights": "label=1"}, ["Did you mean 'labels'?"]),
        ({"distill_weights": "labels"}, ["name=number"]),
        ({"distill_weights": "labels=much"}, ["'much'"]),
        ({"distill_weights": "labels=1,labels=2"}, ["labels twice"]),
        ({"distill_weights": "labels=-1"}, ["0 (left out) or more"]),
        ({"distill_weights": "labels=nan"}, ["0 (left out) or more"]),
        ({"distill_weights": ""}, ["empty"]),
        ({"distill_phases": "intermediat=2"}, ["Did you mean 'intermediate'?"]),
        ({"distill_phases": "prediction=0"}, ["more than 0 epochs"]),
        ({"distill_layer_map": "unifrom"}, ["Did you mean 'uniform'?"]),
        ({"distill_layer_map": "1:3,1:6"}, ["layer 1 two teachers"]),
        ({"distill_layer_map": "1:x"}, ["'1:x'", "student:teacher"]),
        ({"distill_layer_map": "3,6"}, ["'3' is no pair", "student:teacher, as in 1:3,2:6"]),
        ({"distill_layer_map": 63}, ["63", "'1:3,2:6' (in YAML with the quotes)"]),
        ({"distill_layer_map": []}, ["empty"]),
        ({"distill_weights": 1}, ["is 1", "labels=1"]),
        ({"trim_padding": "perhaps"}, ["trim_padding", "true or false"]),
    ],
)
def test_what_cannot_be_meant_is_refused_in_the_users_words(given: dict[str, Any], words: list[str]) -> None:
    with pytest.raises(ArgumentError) as refused:
        CompressionArguments(**given)
    for word in words:
        assert word in str(refused.value)


def test_one_layer_may_be_a_number() -> None:
    assert CompressionArguments(layers_to_drop=3).dropped == (3,)  # type: ignore[arg-type]


def test_weights_phases_and_maps_as_text_or_as_mappings() -> None:
    as_text = CompressionArguments(
        distill_weights="labels=0.5, logits=1", distill_phases="intermediate=20,prediction=1.5", distill_layer_map="1:3, 2:6"
    )
    as_mappings = CompressionArguments(
        distill_weights={"labels": 0.5, "logits": 1},
        distill_phases={"intermediate": 20, "prediction": 1.5},
        distill_layer_map={"1": 3, "2": 6},
    )
    for arguments in (as_text, as_mappings):
        assert arguments.weights == {"labels": 0.5, "logits": 1.0}
        assert arguments.phases == (Phase("intermediate", 20.0), Phase("prediction", 1.5))
        assert arguments.layer_map == "1:3,2:6"
    assert CompressionArguments(distill_layer_map=[[0, 0], [1, 3]]).layer_map == "0:0,1:3"
    assert CompressionArguments(distill_layer_map="kept").layer_map == "kept"


def test_both_stacks_is_the_same_as_no_one_stack() -> None:
    assert CompressionArguments(layer_drop_strategy="top", layer_drop_stack="both").stack is None
    assert CompressionArguments(layer_drop_strategy="top", layer_drop_stack="decoder").stack == "decoder"


def test_a_number_from_the_command_line_is_a_number() -> None:
    arguments = CompressionArguments(layer_drop_strategy="contribution", layer_drop_threshold="0.9")  # type: ignore[arg-type]
    assert arguments.layer_drop_threshold == 0.9
    assert CompressionArguments(layer_drop_strategy="top", num_layers_to_drop="2").num_layers_to_drop == 2  # type: ignore[arg-type]


@pytest.mark.parametrize("suffix", [".json", ".yaml"])
def test_a_file_fills_what_was_not_given(tmp_path: Path, suffix: str) -> None:
    file = tmp_path / f"flags{suffix}"
    content = {"--layer-drop-strategy": "top", "num_layers_to_drop": 2, "freeze_embeddings": True, "distill_weights": {"labels": 0}}
    file.write_text(json.dumps(content))
    arguments = CompressionArguments(num_layers_to_drop=3, hf_compress_config=str(file))
    assert (arguments.strategy, arguments.num_layers_to_drop, arguments.freeze_embeddings) == ("top", 3, True)
    assert arguments.weights == {"labels": 0.0}


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("flags.json", '{"layer_drop_strateg": "top"}', ["flags.json", "Did you mean 'layer_drop_strategy'?"]),
        ("flags.yaml", "learning_rate: 1.0", ["no flag 'learning_rate'. Only its own flags belong in this file"]),
        ("flags.json", "{", ["flags.json", "cannot be read"]),
        ("flags.yaml", "a: b: c", ["flags.yaml", "cannot be read"]),
        ("flags.yaml", "- top", ["holds a list"]),
        ("flags.toml", "", [".json", ".yaml"]),
        ("flags.json", '{"hf_compress_config": "other.json"}', ["cannot stand in such a file"]),
        ("flags.json", '{"layer_drop_strategy": "tpo"}', ["Did you mean 'top'?"]),
        ("flags.json", None, ["flags.json", "No such file"]),
    ],
)
def test_a_file_that_cannot_be_meant_is_refused(tmp_path: Path, name: str, content: str | None, words: list[str]) -> None:
    file = tmp_path / name
    if content is not None:
        file.write_text(content)
    with pytest.raises(ArgumentError) as refused:
        CompressionArguments(hf_compress_config=str(file))
    for word in words:
        assert word in str(refused.value)


@pytest.mark.parametrize(
    ("ours", "theirs"), [(DistillTrainingArguments, TrainingArguments), (Seq2SeqDistillTrainingArguments, Seq2SeqTrainingArguments)]
)
def test_hf_argument_parser_fills_ours_and_theirs(tmp_path: Path, ours: type, theirs: type) -> None:
    command_line = "--layers_to_drop 5-8 --freeze_embeddings --trim-padding False --distill-weights labels=.5,logits=1 --learning_rate 3e-4"
    parsed = HfArgumentParser(ours).parse_args_into_dataclasses([*command_line.split(), "--output_dir", str(tmp_path)])[0]
    assert isinstance(parsed, theirs)
    assert (parsed.dropped, parsed.freeze_embeddings, parsed.trim_padding, parsed.learning_rate) == ((5, 6, 7, 8), True, False, 3e-4)
    assert parsed.weights == {"labels": 0.5, "logits": 1.0}
    assert parsed.wants_layer_drop
    assert parsed.device.type == "cpu"  # TrainingArguments' own __post_init__ ran as well


def test_no_flag_has_the_name_of_one_of_transformers() -> None:
    theirs = {field.name for field in dataclasses.fields(Seq2SeqTrainingArguments)} | set(dir(Seq2SeqTrainingArguments))
    properties = {name for name, value in vars(CompressionArguments).items() if isinstance(value, property)}
    assert not theirs & (set(FIELDS) | properties)


def test_training_arguments_are_saved_as_any(tmp_path: Path) -> None:
    arguments = DistillTrainingArguments(
        output_dir=str(tmp_path), distill_phases="intermediate=2,prediction=1", distill_weights={"labels": 1.0}
    )
    assert json.loads(arguments.to_json_string())["distill_phases"] == "intermediate=2,prediction=1"
    torch.save(arguments, tmp_path / "training_args.bin")
    loaded = torch.load(tmp_path / "training_args.bin", weights_only=False)
    assert loaded.phases == arguments.phases
    assert loaded.weights == {"labels": 1.0}


def test_a_wrong_flag_is_refused_before_training_arguments_are_made(tmp_path: Path) -> None:
    with pytest.raises(ArgumentError, match="symmetric"):
        DistillTrainingArguments(output_dir=str(tmp_path / "out"), layer_drop_strategy="symetric")
    assert not (tmp_path / "out").exists()


def test_every_flag_has_help() -> None:
    for name, field in FIELDS.items():
        assert field.metadata["help"].endswith("."), name


def test_the_flags_load_neither_torch_nor_transformers() -> None:
    code = "import sys, hf_compress.arguments; print(*sorted({'torch', 'transformers', 'numpy'} & set(sys.modules)))"
    root = Path(__file__).parents[1]
    result = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=True)
    assert result.stdout.strip() == ""
