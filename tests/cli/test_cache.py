"""`hf-compress cache`, from folder to folder."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from hf_compress.cache.lock import builder_lock
from hf_compress.cache.manifest import MANIFEST_FILE, Manifest
from hf_compress.cache.selection import Selection
from hf_compress.cli.app import main
from hf_compress.cli.cache_page import facts_of_finished, page_of
from hf_compress.signals import SignalSpec
from tests.cache.tiny_caches import Stopped, Stopping, builder, pairs, scores, states
from tests.tiny_models import tiny_model

ROOT = Path(__file__).parents[2]
WHOLE = SignalSpec(logits=True) | states(2, 4) | scores(2, 4)


def build(folder: Path, spec: SignalSpec = WHOLE, selection: Selection | None = None, **more: Any) -> Path:
    building = builder(folder, tiny_model("bert", num_layers=4, seed=1), pairs(10), spec, selection, **more)
    building.build()
    building.run.source.close()
    return folder


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(tmp_path_factory.mktemp("whole") / "cache", distillation={"distill_recipe": "layerwise", "selected": False})


def lines(text: str) -> dict[str, str]:
    """The page by its first words."""
    return {line[:11].strip(): line[11:] for line in text.splitlines() if line[10:11] == " "}


@pytest.mark.parametrize("command", ["", "info", "verify", "estimate", "view"])
def test_help_loads_nothing_heavy(command: str) -> None:
    code = (
        f"import sys\nfrom hf_compress.cli.app import main\ntry:\n    main(['cache', *'{command}'.split(), '--help'])\nexcept SystemExit:\n"
        "    pass\nprint('loaded', *sorted({'torch', 'transformers', 'numpy', 'datasets', 'safetensors'} & set(sys.modules)))"
    )
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert result.stdout.splitlines()[-1] == "loaded"
    assert f"usage: hf-compress cache {command}".rstrip() in result.stdout


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["inof", "."], "no command 'cache inof'. Did you mean 'info'?"),
        (["info", "nowhere"], "There is no folder nowhere"),
        (["info", "."], "has no manifest.json"),
        (["info"], "FOLDER"),
        (["verify", "nowhere"], "There is no folder nowhere"),
        (["view", ".", "-o", "small"], "Say what to keep"),
        (["view", ".", "-o", "small", "--hsk", "1l"], "has no manifest.json"),
        (["view", ".", "-o", "small", "--hsk", "10 tokens"], "is no selection"),
        (["view", ".", "-o", "small", "--hsk", "10t", "--hsk_length", "atention"], "Did you mean 'attention'?"),
        (["view", ".", "-o", "small", "--teacher_cache_dtype", "int4"], "Did you mean 'int8'?"),
        (["view", "."], "output_dir"),
        (["estimate", "--num_examples", "1", "--tokens_per_example", "1"], "teacher_model_name_or_path"),
        (
            ["estimate", "--teacher_model_name_or_path", "./no", "--num_examples", "1", "--tokens_per_example", "1"],
            "there is no such folder",
        ),
        (["estimate", "--teacher_model_name_or_path", "no/no", "--num_examples", "1", "--tokens_per_example", "1"], "no model in no/no"),
        (["estimate", "--teacher_model_name_or_path", "no", "--num_examples", "0", "--tokens_per_example", "1"], "give numbers above 0"),
    ],
)
def test_errors_are_one_line_and_leave_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], arguments: list[str], words: str
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["cache", *arguments]) == 2
    shown = capsys.readouterr().err
    assert shown.startswith("hf-compress: error: ") and shown.count("\n") == 1
    assert words in shown
    assert list(tmp_path.iterdir()) == []


def test_no_command_shows_the_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["cache"]) == 2
    assert "usage: hf-compress cache COMMAND" in capsys.readouterr().out


# --- info ---


def test_info_of_everything(whole: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["cache", "info", str(whole)]) == 0
    page, manifest = lines(capsys.readouterr().out), Manifest.load(whole)
    assert page["teacher"] == "tiny (BertForSequenceClassification, 4 layers x 16, float32)"
    assert page["signals"] == "logits; hidden states of layer 2, 4; attention scores of layer 2, 4"
    assert page["knowledge"] == "40% of the teacher's hidden states (2 of 5 layers, counting the embedding output)"
    assert page["examples"] == f"{manifest.examples}, {manifest.tokens} tokens"
    assert page["size"].endswith(f"{manifest.bytes / manifest.examples:,.0f} bytes an example, in 1 shard")
    grown = page_of(facts_of_finished(whole, replace(manifest, shards=manifest.shards * 3, appended=2)))
    assert lines(grown)["size"].endswith("bytes an example, in 3 shards, 2 of them appended")
    assert page["recipe"] == "--distill_recipe layerwise"
    assert "--trainer_class DistillTrainer" in page["train"] and f"--teacher_cache_dir {whole}" in page["train"]


@pytest.mark.parametrize("width", ["random", "magnitude"])
def test_info_of_a_part_says_which_share_it_is(tmp_path: Path, capsys: pytest.CaptureFixture[str], width: Any) -> None:
    settings = {"distill_weights": {"logits": 1.0, "hidden_states": 0.5}, "distill_layer_map": [[1, 2], [2, 4]]}
    selection = Selection.parse("1l_3t_0.5h", width_scheme=width)
    build(tmp_path, SignalSpec(logits=True) | states(4), selection, codec="int8", distillation=settings)
    assert main(["cache", "info", str(tmp_path), "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    manifest = Manifest.load(tmp_path)
    kept = 9 * 3 + 2  # an example of four tokens has two that are no separators
    assert facts["knowledge"]["share"] == kept * 8 / (5 * 16 * manifest.tokens)
    assert (facts["finished"], facts["selection"], facts["codec"], facts["examples"]) == (True, "1l_3t_0.5h", "int8", 10)
    assert main(["cache", "info", str(tmp_path)]) == 0
    assert lines(capsys.readouterr().out)["recipe"] == "--distill_weights logits=1.0,hidden_states=0.5 --distill_layer_map 1:2,2:4"


def test_info_of_logits_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    build(tmp_path, SignalSpec(logits=True))
    assert main(["cache", "info", str(tmp_path)]) == 0
    page = lines(capsys.readouterr().out)
    assert page["selection"] == "no hidden states" and page["signals"] == "logits" and "knowledge" not in page


def test_info_of_a_build_that_was_stopped(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hf_compress.cache.plan.SHARD_EXAMPLES", 3)
    model = tiny_model("bert", num_layers=4)
    source = Stopping(model, tmp_path, 2)
    with pytest.raises(Stopped):
        builder(tmp_path, model, pairs(10), states(2), batch_tokens=20, source=source).build()
    source.close()
    whole = sorted(tmp_path.glob("shard-*"))
    assert len(whole) == 2
    assert main(["cache", "info", str(tmp_path)]) == 0
    shown = capsys.readouterr().out
    page = lines(shown)
    assert "not finished" in shown.splitlines()[0]
    assert page["done"].startswith("2 shards, ") and " of 10 examples (" in page["done"]
    assert page["building"] == "nobody: it was stopped"
    assert page["teacher"].startswith("weights ") and "start the command again" in page["go on"]
    whole[1].write_bytes(whole[1].read_bytes()[:-9])
    with builder_lock(tmp_path):
        assert main(["cache", "info", str(tmp_path)]) == 0
    page = lines(capsys.readouterr().out)
    assert page["building"].startswith("now, by process ")
    assert page["damaged"].startswith("shard-00001.safetensors") and page["done"].startswith("1 shard, ")
    (tmp_path / "building.json").write_text("{}")
    assert main(["cache", "info", str(tmp_path)]) == 2
    assert "no plan that hf_compress wrote" in capsys.readouterr().err


def test_info_of_a_damaged_manifest(tmp_path: Path, whole: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.copytree(whole, tmp_path / "cache")
    manifest = tmp_path / "cache" / MANIFEST_FILE
    manifest.write_bytes(manifest.read_bytes().replace(b'"examples": 10', b'"examples": 11'))
    assert main(["cache", "info", str(tmp_path / "cache")]) == 2
    assert "is damaged, or was edited" in capsys.readouterr().err


# --- verify ---


def test_verify_says_whole(whole: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["cache", "verify", str(whole)]) == 0
    assert capsys.readouterr().out.startswith("whole: 10 examples, ")


@pytest.mark.parametrize("name", ["shard-00000.safetensors", "index.safetensors", MANIFEST_FILE])
def test_verify_names_what_is_damaged(tmp_path: Path, whole: Path, capsys: pytest.CaptureFixture[str], name: str) -> None:
    shutil.copytree(whole, tmp_path / "cache")
    file = tmp_path / "cache" / name
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 4
    file.write_bytes(data)
    assert main(["cache", "verify", str(tmp_path / "cache")]) == 1
    problems = capsys.readouterr().out.splitlines()
    assert problems and all("whole:" not in line for line in problems)
    assert any(name in line for line in problems)


# --- estimate ---


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A teacher's config without any weights."""
    folder = tmp_path_factory.mktemp("teacher")
    model = tiny_model("bert", num_layers=4, id2label={0: "no", 1: "yes"}, label2id={"no": 0, "yes": 1})
    model.config.architectures = ["BertForSequenceClassification"]
    model.config.save_pretrained(folder)
    return str(folder)


def table(text: str) -> dict[str, int]:
    """Bytes an example by row."""
    rows = [line.split("  ") for line in text.splitlines()]
    return {cells[0]: int(next(cell for cell in cells[1:] if cell.strip()).replace(",", "")) for cells in rows if line_of_table(cells)}


def line_of_table(cells: list[str]) -> bool:
    filled = [cell for cell in cells if cell.strip()]
    return len(filled) == 5 and filled[1].strip().replace(",", "").isdigit()


def test_estimate(config: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    asked = ["--num_examples", "1000", "--tokens_per_example", "19.2", "--teacher_cache_dir", str(tmp_path / "cache")]
    sized = ["--hsk", "2l_5t_0.5h", "--hsk_width", "random", "--teacher_cache_dtype", "int8", "--num_layers", "2"]
    assert main(["cache", "estimate", "--teacher_model_name_or_path", config, *asked, *sized]) == 0
    shown = capsys.readouterr().out
    rows = table(shown)
    # logits; then 8 + 48 + offsets + a layer's scales, values and positions; "1l" with special tokens and importance
    assert rows["logits only"] == 8 + 48
    assert rows["--hsk 2l_5t_0.5h"] == 8 + 48 + 4 + 2 * 5 * (4 + 8 + 2)
    assert rows["1l_10t_0.1h"] == 8 + 48 + 4 + 10 * (4 + 1 + 2)
    assert rows["1l"] == 8 + 48 + 4 + 20 * (4 + 16 + 4 + 1)
    assert rows["all of the recipe layerwise"] == 8 + 48 + 3 * 4 + 20 * (2 * (4 + 16 + 4) + 1) + 2 * 2 * (20 * 20 + 20 * 4)
    assert "1,000 examples of 20 tokens" in shown and "student    2 layers\n" in shown
    assert "as int8: 200.1 kB" in shown  # 1000 x 200, and two lists of 8 dimensions
    assert f"free in {tmp_path / 'cache'}: " in shown
    assert not (tmp_path / "cache").exists()


def test_estimate_with_another_recipe_and_a_students_config(config: str, capsys: pytest.CaptureFixture[str]) -> None:
    asked = ["estimate", "--teacher_model_name_or_path", config, "--num_examples", "10", "--tokens_per_example", "20"]
    assert main(["cache", *asked, "--distill_recipe", "logits"]) == 0
    rows = table(capsys.readouterr().out)
    assert set(rows) == {"logits only", "all of the recipe logits"} and len(set(rows.values())) == 1
    logits = rows["logits only"]
    assert main(["cache", *asked, "--distill_recipe", "minilmv2"]) == 0
    assert table(capsys.readouterr().out)["all of the recipe minilmv2"] == logits + 4 + 3 * 20 * (
        16 + 4
    )  # queries, keys, values, a scale each
    assert main(["cache", *asked, "--distill_recipe", "ckd"]) == 0  # compares whole layers alone
    assert set(table(capsys.readouterr().out)) == {"logits only", "all of the recipe ckd"}
    assert main(["cache", *asked, "--distill_recipe", "ckd", "--hsk", "1l"]) == 2
    assert "combined_layers has a rule of its own" in capsys.readouterr().err
    assert main(["cache", *asked, "--distill_weights", "attention_scores=0"]) == 0
    deep = capsys.readouterr().out
    assert main(["cache", *asked, "--distill_weights", "attention_scores=0", "--distill_layer_map", "1:2"]) == 0
    shallow = capsys.readouterr().out
    assert "as deep as the teacher" in deep and "student    1 layers" in shallow
    assert table(deep)["all of the recipe layerwise"] > 3 * table(shallow)["all of the recipe layerwise"]
    assert main(["cache", *asked, "--model_name_or_path", config, "--distill_weights", "attention_scores=0"]) == 0
    assert table(capsys.readouterr().out) == table(deep)
    assert main(["cache", *asked, "--model_name_or_path", config, "--num_layers", "2"]) == 2
    assert "give one of them" in capsys.readouterr().err


# --- view ---


def test_view_writes_what_can_be_viewed_and_verified(tmp_path: Path, whole: Path, capsys: pytest.CaptureFixture[str]) -> None:
    small, smaller = str(tmp_path / "small"), str(tmp_path / "smaller")
    assert main(["cache", "view", str(whole), "-o", small, "--hsk", "1l_5t", "--teacher_cache_dtype", "float16"]) == 0
    shown = capsys.readouterr().out
    assert shown.startswith(f"{small}: 1l_5t (") and "10 examples, " in shown
    assert main(["cache", "view", small, "-o", smaller, "--hsk", "1l_2t_0.5h", "--hsk_width", "random"]) == 0
    for folder in (small, smaller):
        assert main(["cache", "verify", folder]) == 0
    manifest = Manifest.load(tmp_path / "smaller")
    assert manifest.selection["codec"] == "float16" and manifest.teacher == Manifest.load(whole).teacher
    assert manifest.distillation == {"distill_recipe": "layerwise", "selected": True}
    # The recipe does not name attention, so a run with a selection compares none.
    assert {column.name for column in manifest.columns} == {
        "logits.values",
        *(f"hidden_states.layers.4.{part}" for part in ("positions", "values")),
    }


def test_view_keeps_the_attention_that_a_recipe_names(tmp_path: Path) -> None:
    build(tmp_path / "whole", distillation={"distill_recipe": "tinybert"})
    assert main(["cache", "view", str(tmp_path / "whole"), "-o", str(tmp_path / "small"), "--hsk", "1l_2t"]) == 0
    assert "attention_scores.layers.2.values" in {column.name for column in Manifest.load(tmp_path / "small").columns}


def test_view_that_cannot_be(tmp_path: Path, whole: Path, capsys: pytest.CaptureFixture[str]) -> None:
    small = str(tmp_path / "small")
    assert main(["cache", "view", str(whole), "-o", small, "--hsk", "1l_2t"]) == 0
    capsys.readouterr()
    assert main(["cache", "view", small, "-o", str(tmp_path / "other"), "--hsk", "1l_3t"]) == 2
    shown = capsys.readouterr().err
    assert "it holds 2 tokens an example, not 3" in shown
    assert sorted(path.name for path in tmp_path.iterdir()) == ["small"]
