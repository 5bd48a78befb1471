"""Whose flag is it: the command line of `hf-compress run`, split."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

from hf_compress.errors import ArgumentError, ScriptError
from hf_compress.script_arguments import (
    PACKAGED_SCRIPTS,
    ScriptRequest,
    find_script,
    flag_parser,
    misspelt_flags,
    parse_command_line,
    script_command_line,
)


@pytest.fixture
def script(tmp_path: Path) -> str:
    path = tmp_path / "train.py"
    path.write_text("")
    return str(path)


def script_argv(request: ScriptRequest) -> list[str]:
    with script_command_line(request) as argv:
        return argv[1:]


def test_ours_are_taken_from_wherever_they_stand(script: str) -> None:
    request = parse_command_line(
        [
            script,
            "--lr",
            "1",
            "--layer_drop_strategy",
            "top",
            "positional",
            "--num-layers-to-drop=2",
            "-x",
            "-1",
            "--freeze_embeddings",
            "--bf16",
        ]
    )
    assert script_argv(request) == ["--lr", "1", "positional", "-x", "-1", "--bf16"]
    assert (request.compression.strategy, request.compression.num_layers_to_drop) == ("top", 2)
    assert request.compression.freeze_embeddings
    assert set(request.given) == {"layer_drop_strategy", "num_layers_to_drop", "freeze_embeddings"}


def test_what_is_not_ours_is_left_alone(script: str) -> None:
    arguments = ["--layer_drop", "0.1", "--teacher", "x", "--dis", "--num_layers=3", "--trim", "a b", "-hidden", "-t", "3"]
    request = parse_command_line([script, *arguments])
    assert script_argv(request) == arguments
    assert request.given == ()


@pytest.mark.parametrize("launcher", [["--local_rank=1"], ["--local-rank=1"], ["--local_rank", "1"]])
def test_a_launchers_flag_before_the_script_reaches_the_script(script: str, launcher: list[str]) -> None:
    request = parse_command_line([*launcher, script, "--layer_drop_strategy", "top", "--lr", "1"])
    assert request.script == Path(script)
    assert script_argv(request) == [*launcher, "--lr", "1"]


@pytest.mark.parametrize(("value", "meant"), [([], True), (["True"], True), (["false"], False), (["0"], False)])
def test_switches_take_a_value_or_none(script: str, value: list[str], meant: bool) -> None:
    compression = parse_command_line([script, "--trim_padding", *value, "--lr", "1"]).compression
    assert compression.trim_padding is meant


@pytest.mark.parametrize("flag", ["-h", "--help"])
def test_help_is_asked_for_in_two_ways(script: str, flag: str) -> None:
    assert parse_command_line([script, "--lr", "1", flag]).help
    assert parse_command_line([flag]).help
    assert not parse_command_line([script]).help


def test_the_last_of_a_flag_given_twice_counts(script: str) -> None:
    assert parse_command_line([script, "--layers_to_keep", "1", "--layers_to_keep", "2"]).compression.kept == (2,)


@pytest.mark.parametrize("suffix", [".json", ".yaml", ".yml"])
def test_the_scripts_own_argument_file_is_split(script: str, tmp_path: Path, suffix: str) -> None:
    file = tmp_path / f"flags{suffix}"
    ours, theirs = {"layer_drop_strategy": "top", "num_layers_to_drop": 2}, {"learning_rate": 1e-5, "output_dir": "out", "do_train": True}
    file.write_text(json.dumps({**ours, **theirs}) if suffix == ".json" else yaml.safe_dump({**ours, **theirs}))
    request = parse_command_line([script, str(file)])
    assert (request.compression.strategy, request.compression.num_layers_to_drop) == ("top", 2)
    with script_command_line(request) as (name, argument):
        assert name == script
        assert Path(argument).suffix == suffix
        assert Path(argument) != file
        read = json.loads if suffix == ".json" else yaml.safe_load
        assert read(Path(argument).read_text()) == theirs
    assert not Path(argument).exists()
    assert set(yaml.safe_load(file.read_text())) == {*ours, *theirs}


def test_an_argument_file_without_our_keys_is_passed_on_as_it_is(script: str, tmp_path: Path) -> None:
    file = tmp_path / "flags.json"
    file.write_text('{"learning_rate": 1e-5}')
    request = parse_command_line([script, str(file), "--layer_drop_strategy", "top"])
    assert script_argv(request) == [str(file)]


@pytest.mark.parametrize("content", ["{", "[1]", None])
def test_an_argument_file_that_is_none_is_left_to_the_script(script: str, tmp_path: Path, content: str | None) -> None:
    file = tmp_path / "flags.json"
    if content is not None:
        file.write_text(content)
    assert script_argv(parse_command_line([script, str(file)])) == [str(file)]


def test_the_command_line_wins_over_the_config_and_that_over_the_scripts_file(script: str, tmp_path: Path) -> None:
    file, config = tmp_path / "flags.json", tmp_path / "compress.yaml"
    file.write_text(json.dumps({"layer_drop_strategy": "top", "num_layers_to_drop": 1, "distill_temperature": 1.0}))
    config.write_text("layer_drop_strategy: bottom\nnum_layers_to_drop: 2\n")
    request = parse_command_line([script, str(file), "--hf_compress_config", str(config), "--layer_drop_strategy", "symmetric"])
    compression = request.compression
    assert (compression.strategy, compression.num_layers_to_drop, compression.distill_temperature) == ("symmetric", 2, 1.0)


def test_false_on_the_command_line_wins_over_true_in_the_config(script: str, tmp_path: Path) -> None:
    config = tmp_path / "compress.json"
    config.write_text('{"freeze_embeddings": true}')
    assert parse_command_line([script, "--hf_compress_config", str(config)]).compression.freeze_embeddings
    request = parse_command_line([script, "--hf_compress_config", str(config), "--freeze_embeddings", "False"])
    assert not request.compression.freeze_embeddings


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], "No script"),
        (["--layer_drop_strategy", "top", "train.py"], "comes first"),
        (["nowhere.py"], "no script nowhere.py"),
        (["gleu"], "Did you mean 'glue'?"),
        (["."], "is a folder"),
    ],
)
def test_no_script_is_a_clear_error(arguments: list[str], words: str) -> None:
    with pytest.raises(ScriptError, match=words.replace("?", r"\?")):
        parse_command_line(arguments)


def test_a_misspelt_script_is_found_beside_its_name(script: str) -> None:
    with pytest.raises(ScriptError, match=r"Did you mean .*train\.py"):
        find_script(script.replace("train.py", "trian.py"))


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--layer_drop_strategy"], "expected one argument"),
        (["--trim_padding", "perhaps"], "neither true nor false"),
        (["--num_layers_to_drop", "two", "--layer_drop_strategy", "top"], "'two'"),
        (["--layer_drop_strategy", "tip"], "Did you mean 'top'"),
        (["--hf_compress_config", "nowhere.json"], "nowhere.json"),
    ],
)
def test_a_wrong_flag_is_an_argument_error(script: str, arguments: list[str], words: str) -> None:
    with pytest.raises(ArgumentError, match=words):
        parse_command_line([script, *arguments])


def test_the_packaged_scripts_are_there() -> None:
    assert find_script("glue") == PACKAGED_SCRIPTS["glue"]
    assert all(path.is_file() for path in PACKAGED_SCRIPTS.values())


def test_a_file_of_the_name_of_a_packaged_script_wins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "glue").write_text("")
    monkeypatch.chdir(tmp_path)
    assert find_script("glue") == Path("glue")


def test_slips_of_the_pen_are_noticed_and_others_flags_are_not(script: str) -> None:
    request = parse_command_line([script, "--layer_drop_strateg", "top", "--model_name_or_path", "x", "--teacher_model_name_or_pth=y"])
    hints = misspelt_flags(request)
    assert len(hints) == 2
    assert "--layer_drop_strategy" in hints[0]
    assert "--teacher_model_name_or_path" in hints[1]


def test_the_help_names_every_flag_once() -> None:
    text = flag_parser().format_help()
    for flag in ("--layer_drop_strategy", "--distill_phases", "--hf_compress_config", "--traceback"):
        assert text.count(f"  {flag}") == 1
    assert "--layer-drop-strategy" not in text
