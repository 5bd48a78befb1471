"""`hf-compress study`: what it refuses before it starts anything, and one whole study of a script, stopped by a run that fails."""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
from pathlib import Path

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from hf_compress.cache.manifest import Manifest
from hf_compress.cli.app import main
from hf_compress.report.study_runs import read_record
from tests.tiny_models import tiny_model

ROOT = Path(__file__).parents[2]
WORDS = ["the", "room", "was", "clean", "quiet", "dirty", "loud", "and", "bath", "bar"]
TEXTS = [f"the {place} was {word} and {other}" for place in ("room", "bath", "bar") for word, other in
         (("clean", "quiet"), ("dirty", "loud"), ("quiet", "clean"), ("loud", "dirty"))]  # fmt: skip
# Breaks one run, as long as the file is there; else it is the packaged script.
SCRIPT = """
import os, runpy, sys
if "1l_2t_0.5h/seed-2" in sys.argv[sys.argv.index("--output_dir") + 1] and os.path.exists({broken!r}):
    sys.exit("the disk is on fire")
# It asks for --do_train and --do_eval.
runpy.run_path({glue!r}, run_name="__main__")
"""


def save_model(folder: Path, layers: int, seed: int) -> str:
    backend = Tokenizer(models.WordLevel({word: number for number, word in enumerate(["[PAD]", "[UNK]", *WORDS])}, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    model = tiny_model("bert", num_layers=layers, seed=seed, initializer_range=0.3)
    model.config.id2label, model.config.label2id = {0: "bad", 1: "good"}, {"bad": 0, "good": 1}
    model.save_pretrained(folder)
    PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="[PAD]", unk_token="[UNK]", model_max_length=16).save_pretrained(folder)
    return str(folder)


def setting(folder: Path) -> list[str]:
    """Flags of a study of a tiny student, that trains in a second on the CPU."""
    data = folder / "data.csv"
    data.write_text("\n".join(["sentence,label", *(f"{text},{'good' if 'clean' in text else 'bad'}" for text in TEXTS)]) + "\n")
    return [
        *("--output_dir", str(folder / "out"), "--teacher_model_name_or_path", save_model(folder / "teacher", 4, 1)),
        *("--model_name_or_path", save_model(folder / "student", 2, 2), "--train_file", str(data), "--validation_file", str(data)),
        *("--do_train", "--do_eval", "--distill_phases", "intermediate=1,prediction=1", "--per_device_train_batch_size", "4"),
        *("--learning_rate", "0.01", "--use_cpu", "True", "--report_to", "none", "--cache_dir", str(folder / "hub")),
    ]


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (["--study_parts", "ends,detph"], "Did you mean 'depth'?"),
        (["--arms", "1l_10"], "is no selection"),
        (["--arms", "3l"], "3l asks for 3 pairs of layers, but there are 2"),
        (["--seeds", "42,many"], "--seeds: 'many' is no whole number"),
        (["--hsk_width", "magnitud"], "Did you mean 'magnitude'?"),
        (["--jobs", "0"], "--jobs 0"),
        (["--study_lines", "majority"], "majority=0.684"),
        (["--table_only"], "--table_only needs the teacher on disk"),
        (["--hsk", "1l"], "--hsk is not for"),
        (["--model_name_or_path", "no/such"], "There is no model in no/such"),
        (["--distill_recipe", "logits"], "compares no hidden states"),
    ],
)
def test_errors_are_one_line_and_leave_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str], more: list[str], words: str) -> None:
    flags = setting(tmp_path)
    capsys.readouterr()
    assert main(["study", "glue", *flags, *more]) == 2
    shown = capsys.readouterr().err
    assert shown.startswith("hf-compress: error: ") and shown.count("\n") == 1
    assert words in shown
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], "No script was named"),
        (["glue", "--do_train", "--do_eval"], "--output_dir"),
        (["gleu", "--output_dir", "out"], "Did you mean 'glue'?"),
        (["glue", "--output_dir", "out", "--do_train"], "--do_eval is not given"),
        (["glue", "--output_dir", "out", "--do_train", "--do_eval"], "--study_student with a folder"),
    ],
)
def test_what_is_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], arguments: list[str], words: str
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["study", *arguments]) == 2
    shown = capsys.readouterr().err
    assert shown.startswith("hf-compress: error: ") and words in shown
    assert list(tmp_path.iterdir()) == []


def test_help_loads_no_torch() -> None:
    code = (
        "import sys\nfrom hf_compress.cli.app import main\ntry:\n    main(['study', '--help'])\nexcept SystemExit:\n    pass\n"
        "print('loaded', *sorted({'torch', 'transformers', 'numpy', 'datasets'} & set(sys.modules)))"
    )
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert result.stdout.splitlines()[-1] == "loaded"
    assert "hf-compress study SCRIPT" in result.stdout


@pytest.mark.slow
def test_a_study_of_a_script(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Three arms, two seeds; one run fails, and is trained when the same command is given again."""
    broken, script, out = tmp_path / "broken", tmp_path / "script.py", tmp_path / "out"
    broken.touch()
    script.write_text(SCRIPT.format(broken=str(broken), glue=str(ROOT / "hf_compress" / "scripts" / "run_glue.py")))
    command = ["study", str(script), *setting(tmp_path), "--arms", "1l_2t_0.5h", "--seeds", "1,2", "--jobs", "2"]
    assert main(command) == 1
    shown = capsys.readouterr()
    assert "3 arms x 2 seeds: 6 runs" in shown.out and "to be built; layers needed: 2, 4" in shown.out
    assert "the disk is on fire" in shown.out + shown.err
    runs = {f"{arm}/seed-{seed}": out / "runs" / arm / f"seed-{seed}" for arm in ("none", "all", "1l_2t_0.5h") for seed in (1, 2)}
    records = {name: read_record(folder) for name, folder in runs.items()}
    assert [name for name, record in records.items() if record is None] == ["1l_2t_0.5h/seed-2"]
    assert json.loads((out / "study.json").read_text())["failed"] == ["1l_2t_0.5h, seed 2 (exit code 1)"]
    manifest = Manifest.load(out / "teacher_on_disk")
    assert manifest.examples == len(TEXTS) and manifest.teacher.scores.keys() == {"teacher_accuracy"}
    times = {name: (folder / "eval_results.json").stat().st_mtime_ns for name, folder in runs.items() if records[name] is not None}

    broken.unlink()
    assert main(command) == 0
    assert times == {name: (runs[name] / "eval_results.json").stat().st_mtime_ns for name in times}  # these five were not repeated
    scores = {name: json.loads((folder / "eval_results.json").read_text())["eval_accuracy"] for name, folder in runs.items()}
    found = json.loads((out / "study.json").read_text())
    assert (found["metric"], found["failed"], found["missing"]) == ("accuracy", [], 0)
    rows = {row["name"]: row for row in found["rows"]}
    for arm in ("none", "all", "1l_2t_0.5h"):
        by_hand = [scores[f"{arm}/seed-1"], scores[f"{arm}/seed-2"]]
        assert rows[arm]["scores"] == {"1": by_hand[0], "2": by_hand[1]}
        assert rows[arm]["mean"] == pytest.approx(sum(by_hand) / 2) and rows[arm]["spread"] == pytest.approx(statistics.stdev(by_hand))
        assert f"{100 * sum(by_hand) / 2:.2f}" in (out / "study.md").read_text()
    tokens = 6 * len(TEXTS)  # every text has 6 words
    assert rows["all"]["share"] == pytest.approx(2 / 3) and manifest.tokens == tokens
    assert rows["1l_2t_0.5h"]["share"] == pytest.approx(1 / 3 * 2 / 6 * 0.5)
    assert rows["1l_2t_0.5h"]["paper_share"] == pytest.approx(1 / 3 * 2 / 128 * 0.5)
    assert rows["none"]["bytes_an_example"] == 48 + 8
    assert (out / "study.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    # The arms differ in what they read: after the first phase all but one have learnt from hidden states.
    logs = {arm: (runs[f"{arm}/seed-1"] / "study_run.log").read_text() for arm in ("none", "all", "1l_2t_0.5h")}
    assert "phase 1 of 1: prediction, 2 epochs" in logs["none"]
    assert all("phase 1 of 2: intermediate" in logs[arm] for arm in ("all", "1l_2t_0.5h"))
    assert "hidden states 1l_2t_0.5h (" in logs["1l_2t_0.5h"]
    assert not list(out.glob("runs/*/*/*.safetensors"))

    capsys.readouterr()
    assert main([*command, "--table_only", "--metric", "acuracy"]) == 2
    assert "Did you mean 'accuracy'?" in capsys.readouterr().err
    other = [word if word != "0.01" else "0.02" for word in command]
    assert main(other) == 2
    assert "finished, but with another command: `0.01` there, `0.02` now" in capsys.readouterr().err
