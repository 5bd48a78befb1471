"""DeepSpeed's configs by name, and the keys that a config may not hold any more."""

from __future__ import annotations

import base64
import json
from pathlib import Path
from typing import Any

import pytest

from hf_compress import deepspeed_config
from hf_compress.deepspeed_configs import CONFIG_NAMES, FOLDER, REMOVED, named_config
from hf_compress.errors import ArgumentError
from hf_compress.script_arguments import ScriptRequest, parse_command_line, script_command_line


@pytest.fixture
def script(tmp_path: Path) -> str:
    path = tmp_path / "train.py"
    path.write_text("")
    return str(path)


def config_file(folder: Path, content: Any) -> str:
    path = folder / "ds.json"
    path.write_text(json.dumps(content))
    return str(path)


def script_argv(request: ScriptRequest) -> list[str]:
    with script_command_line(request) as argv:
        return argv[1:]


def test_every_file_has_a_name_and_every_name_a_file() -> None:
    assert {path.stem for path in FOLDER.glob("*.json")} == set(CONFIG_NAMES)


@pytest.mark.parametrize("name", CONFIG_NAMES)
def test_a_named_config_leaves_to_the_trainer_what_it_can_say(name: Any) -> None:
    config = deepspeed_config(name)
    zero = config["zero_optimization"]
    assert zero["stage"] == int(name[4])
    assert ("offload_optimizer" in zero) == name.endswith("_offload")
    assert zero.get("stage3_gather_16bit_weights_on_model_save", False) == (zero["stage"] == 3)
    assert config["train_micro_batch_size_per_gpu"] == config["gradient_clipping"] == config["bf16"]["enabled"] == "auto"
    assert not {"optimizer", "scheduler", *REMOVED} & {*config, *(f"zero_optimization.{key}" for key in zero)}
    config["zero_optimization"]["stage"] = 0  # a copy: the next one is as it was
    assert deepspeed_config(name)["zero_optimization"]["stage"] == int(name[4])


def test_a_name_becomes_a_path_before_the_script_sees_it(script: str, tmp_path: Path) -> None:
    path = str(FOLDER / "zero2.json")
    assert script_argv(parse_command_line([script, "--deepspeed", "zero2", "--lr", "1"])) == ["--deepspeed", path, "--lr", "1"]
    assert script_argv(parse_command_line([script, "--deepspeed=zero2"])) == [f"--deepspeed={path}"]
    assert script_argv(parse_command_line([script, "--deepspeed", "--lr", "1"])) == ["--deepspeed", "--lr", "1"]
    own = config_file(tmp_path, {"zero_optimization": {"stage": 1}})
    assert script_argv(parse_command_line([script, "--deepspeed", own])) == ["--deepspeed", own]


def test_a_name_in_the_scripts_argument_file_becomes_a_path_too(script: str, tmp_path: Path) -> None:
    file = tmp_path / "arguments.json"
    file.write_text(json.dumps({"deepspeed": "zero3", "learning_rate": 1e-05}))
    with script_command_line(parse_command_line([script, str(file)])) as argv:
        assert json.loads(Path(argv[1]).read_text()) == {"deepspeed": str(FOLDER / "zero3.json"), "learning_rate": 1e-05}
    file.write_text(json.dumps({"deepspeed": {"zero_optimization": {"stage": 1}}, "learning_rate": 1e-05}))
    assert script_argv(parse_command_line([script, str(file)])) == [str(file)]
    file.write_text(json.dumps({"deepspeed": {"elasticity": {}}}))
    with pytest.raises(ArgumentError, match="elasticity: batch sizes are --per_device_train_batch_size"):
        parse_command_line([script, str(file)])


@pytest.mark.parametrize(
    ("value", "match"),
    [
        ("zero4", r"there is no such file, and no config of that name\. Did you mean 'zero[123]'\?"),
        ("./zero2", "there is no such file"),
        ('{"amp": {"enabled": true}}', "amp: mixed precision is"),
        (base64.urlsafe_b64encode(b'{"nebula": {}}').decode(), "nebula: checkpoints are written by torch"),
        (
            {"zero_optimization": {"mics_shard_size": 2}, "eigenvalue": {}},
            r"\(eigenvalue, zero_optimization.mics_shard_size\); take them out",
        ),
    ],
)
def test_what_is_no_config_and_what_deepspeed_has_removed(value: Any, match: str) -> None:
    with pytest.raises(ArgumentError, match=match):
        named_config(value)


def test_a_file_that_is_no_config(tmp_path: Path) -> None:
    (tmp_path / "ds.json").write_text("{")
    with pytest.raises(ArgumentError, match=r"--deepspeed: .*ds\.json cannot be read"):
        named_config(str(tmp_path / "ds.json"))
    with pytest.raises(ArgumentError, match="holds a list; expected a DeepSpeed config"):
        named_config(config_file(tmp_path, []))
    with pytest.raises(ArgumentError, match=r"There is no DeepSpeed config 'zero_2'\. Did you mean 'zero2'\?"):
        deepspeed_config("zero_2")  # type: ignore[arg-type]


def test_layer_reduction_is_answered_with_our_flags(script: str, tmp_path: Path) -> None:
    reduction = {
        "enabled": True,
        "keep_number_layer": 4,
        "module_name_prefix": "bert.encoder.layer",
        "teacher_layer": [1, 3, 5, 7],
        "other_module_name": ["bert.pooler"],
    }
    own = config_file(tmp_path, {"compression_training": {"layer_reduction": reduction, "weight_quantization": {}}})
    with pytest.raises(ArgumentError) as refused:
        parse_command_line([script, "--deepspeed", own])
    said = str(refused.value)
    assert "--layers_to_keep 2,4,6,8: layers are counted from 1 here, and teacher_layer 1,3,5,7 counts from 0" in said
    assert "nothing here quantizes" in said and "--layer_drop_stack" not in said
    # What it says is a command line that works.
    assert parse_command_line([script, "--layers_to_keep", "2,4,6,8"]).compression.kept == (2, 4, 6, 8)
    reduction = {"keep_number_layer": 3, "module_name_prefix": "model.decoder.layers", "teacher_layer": [4, 0, 2]}
    with pytest.raises(ArgumentError, match=r"--layers_to_keep 1,3,5 \(with --layer_drop_stack decoder .*in the teacher's order"):
        named_config({"compression_training": {"layer_reduction": reduction}})
    with pytest.raises(ArgumentError, match="hf-compress student TEACHER -o DIR --num_hidden_layers 3"):
        named_config({"compression_training": {"layer_reduction": {"keep_number_layer": 3}}})


def test_a_config_that_accelerate_launch_was_given_is_looked_at_too(script: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ACCELERATE_DEEPSPEED_CONFIG_FILE", config_file(tmp_path, {"progressive_layer_drop": {"enabled": True}}))
    with pytest.raises(ArgumentError, match=r"--deepspeed_config_file .*progressive_layer_drop: --layer_drop_strategy drops layers"):
        parse_command_line([script])


@pytest.mark.slow
def test_the_list_of_removed_keys_is_deepspeeds_own() -> None:
    from deepspeed.runtime import config

    theirs = {*config._REMOVED_TOP_LEVEL_CONFIG_KEYS, *(f"zero_optimization.{key}" for key in config._REMOVED_ZERO_CONFIG_KEYS)}
    assert theirs == set(REMOVED)
