"""Caches to the hub: what a push leaves there, whom it refuses; the words of addresses, and the commands."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from hf_compress.arguments import CompressionArguments
from hf_compress.cache.hub import read_manifest
from hf_compress.cache.hub_address import HubAddress
from hf_compress.cache.hub_card import OURS
from hf_compress.cache.manifest import Manifest
from hf_compress.cache.reader import TeacherCache
from hf_compress.cache.verify import verify
from hf_compress.cli.app import main
from hf_compress.errors import ArgumentError, CacheError
from tests.cache.hub_client import ADDRESS, ROOT, home_of, pushed
from tests.cache.hub_server import TOKEN, HubServer, Repo

# --- pushing ---


def test_the_card_says_whose_it_is_and_how_to_train_from_it(hub: HubServer, cache: Path) -> None:
    pushed(hub, cache, private=True)
    assert hub.repos["me/cache"].private
    text = hub.files("me/cache")["README.md"].decode()
    _, front, body = text.split("---\n", 2)
    assert yaml.safe_load(front)["tags"][:2] == ["hf_compress", "teacher-cache"]
    manifest = Manifest.load(cache)
    for words in (
        "**tiny**",
        "BertForSequenceClassification, 4 layers x 16",
        "logits; hidden states of layer 2, 4",
        f"| examples | {manifest.examples}, {manifest.tokens} tokens |",
        "float32",
        f"--teacher_cache_dir {ADDRESS}",
        "There are no texts in it",
    ):
        assert words in body
    assert "/" not in body.split("| teacher |")[1].splitlines()[0]


def test_a_card_of_ones_own_is_kept(hub: HubServer, cache: Path, tmp_path: Path) -> None:
    pushed(hub, cache)
    files = hub.files("me/cache")
    ours = files["README.md"]
    files["README.md"] = ours.replace(b"# Teacher", b"# My Teacher")
    pushed(hub, cache, commit_message="ours is written anew")
    assert hub.files("me/cache")["README.md"] == ours
    hub.files("me/cache")["README.md"] = own = ours.replace(OURS.encode(), b"")
    pushed(hub, cache, commit_message="theirs is not")
    assert hub.files("me/cache")["README.md"] == own
    folder = Path(shutil.copytree(cache, tmp_path / "copy"))
    (folder / "README.md").write_text("# Mine\n")
    pushed(hub, folder, commit_message="that of the folder is taken")
    assert hub.files("me/cache")["README.md"] == b"# Mine\n"
    assert verify(folder).problems == ()


def test_a_damaged_cache_is_not_pushed(hub: HubServer, cache: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(cache, tmp_path / "copy"))
    shard = folder / "shard-00000.safetensors"
    opened = TeacherCache(folder)
    shard.write_bytes(shard.read_bytes()[:-1] + b"\x55")
    with pytest.raises(CacheError, match=r"is damaged, so nothing was uploaded: .*shard-00000"):
        opened.push_to_hub("me/cache")
    shard.unlink()
    shard.symlink_to(cache / shard.name)
    with pytest.raises(CacheError, match="is a symbolic link"):
        opened.push_to_hub("me/cache")
    assert hub.requests == []


def test_private_is_not_promised_for_what_is_public(hub: HubServer, cache: Path) -> None:
    hub.repos["me/cache"] = Repo()
    hub.repos["me/cache"].commit("main", {}, "made by hand")
    with pytest.raises(CacheError, match="me/cache is there already, and everybody can read it: nothing was uploaded"):
        TeacherCache(cache).push_to_hub("me/cache", private=True)
    assert hub.files("me/cache") == {} and hub.uploaded == {}


@pytest.mark.parametrize(
    ("token", "repo", "words"),
    [
        (None, "me/cache", "does not take your token, or you have none"),
        ("hf_an_old_one", "me/cache", "does not take your token, or you have none"),
        (TOKEN, "you/cache", "your token may not do that. Is you you, or an organization that you belong to"),
    ],
)
def test_who_may_not_push(hub: HubServer, cache: Path, monkeypatch: pytest.MonkeyPatch, token: str | None, repo: str, words: str) -> None:
    monkeypatch.delenv("HF_TOKEN")
    if token is not None:
        monkeypatch.setenv("HF_TOKEN", token)
    with pytest.raises(CacheError, match=words):
        TeacherCache(cache).push_to_hub(repo)
    assert hub.uploaded == {}


# --- words ---


@pytest.mark.parametrize(
    ("text", "address"),
    [
        ("hf://datasets/me/cache", HubAddress("me/cache")),
        ("hf://me/cache", HubAddress("me/cache")),
        ("me/ca.ch-e_1", HubAddress("me/ca.ch-e_1")),
        ("hf://me/cache@v1/a/b/", HubAddress("me/cache", "v1", "a/b")),
        ("hf://datasets/me/cache@refs%2Fpr%2F1", HubAddress("me/cache", "refs/pr/1")),
        ("hf://me/cache/a@b", HubAddress("me/cache", "main", "a@b")),
    ],
)
def test_an_address_is_read_and_written(text: str, address: HubAddress) -> None:
    assert HubAddress.parse(text) == address
    assert HubAddress.parse(str(address)) == address


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("hf://me", "names no data set repository"),
        ("hf:/me/cache", "Expected hf://datasets/USER/NAME"),
        ("hf://datasets/cache", "lacks the USER or the NAME"),
        ("hf://models/me/cache", "not among the models of the hub"),
        ("hf://me/cache@", "names no data set repository"),
        ("hf://me/cache/../x", "../x is no folder in a repository"),
        ("https://huggingface.co/me/cache", "Expected hf://datasets/USER/NAME"),
        ("https://huggingface.co/datasets/me/cache", "Write hf://datasets/me/cache$"),
        ("https://huggingface.co/datasets/me/cache/tree/v1/a/b", "Write hf://datasets/me/cache@v1/a/b$"),
    ],
)
def test_what_is_no_address_is_refused_with_the_flags(text: str, words: str) -> None:
    with pytest.raises(ArgumentError, match=words):
        CompressionArguments(teacher_cache_dir=text)


def test_nothing_is_built_on_the_hub() -> None:
    with pytest.raises(ArgumentError, match=r"Build it in a folder .* then `hf-compress cache push FOLDER me/cache`"):
        CompressionArguments(teacher_cache_dir=ADDRESS, build_teacher_cache_only=True)
    with pytest.raises(ArgumentError, match="nothing is appended to hf://datasets/me/cache"):
        CompressionArguments(teacher_cache_dir=ADDRESS, teacher_cache_miss="live")


# --- commands ---


def test_the_commands(hub: HubServer, cache: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["cache", "push", str(cache), "me/cache", "--private", "--commit-message", "words"]) == 0
    commit = hub.repos["me/cache"].branches["main"]
    assert (
        capsys.readouterr().out
        == f"{hub.url}/datasets/me/cache/commit/{commit}\ntrain from it, on any machine: --teacher_cache_dir {ADDRESS}\n"
    )
    assert hub.repos["me/cache"].private and hub.repos["me/cache"].messages[-1] == "words"
    hub.requests.clear()
    assert main(["cache", "info", "hf://me/cache"]) == 0
    assert "hf://me/cache: a teacher on disk\n" in (page := capsys.readouterr().out)
    assert "--teacher_cache_dir hf://me/cache ..." in page
    assert hub.downloads() == ["manifest.json"] and not home_of(tmp_path).exists()
    assert main(["cache", "info", "hf://me/cache", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["examples"] == read_manifest(ADDRESS).examples == 10
    assert main(["cache", "verify", "hf://me/cache"]) == 0
    assert capsys.readouterr().out.startswith("whole: 10 examples")
    assert main(["cache", "view", "hf://me/cache", "-o", str(tmp_path / "small"), "--hsk", "1t_0.5h"]) == 0
    assert verify(tmp_path / "small").problems == ()


def test_a_folder_may_be_named_as_the_repository_is(hub: HubServer, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.copytree(cache, tmp_path / "me" / "cache")
    monkeypatch.chdir(tmp_path)
    assert main(["cache", "push", "me/cache", "me/cache"]) == 0
    assert read_manifest(ADDRESS).examples == 10


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["me/cache", "{cache}"], "First the folder, then where it goes: `hf-compress cache push {cache} me/cache`"),
        (["nowhere", "me/cache"], "There is no folder nowhere"),
        (["{cache}", "cache"], "'cache' names no data set repository on the Hugging Face hub. Expected USER/NAME, with"),
        (["{cache}", "me/cache@v1", "--revision", "v2"], "names the branch v1, and --revision the branch v2"),
        (["{cache}", "me/cache", "--revision", "0" * 40], "is a commit, and nothing can be added to it"),
        ([".", "me/cache"], "has no manifest.json"),
        (["{cache}"], "USER/NAME"),
    ],
)
def test_mistakes_in_a_push_are_one_line(
    hub: HubServer, cache: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], words: str
) -> None:
    assert main(["cache", "push", *(word.format(cache=cache) for word in arguments)]) == 2
    told = capsys.readouterr().err
    assert words.format(cache=cache) in told and told.count("\n") == 1
    assert hub.requests == []


def test_help_loads_nothing_heavy() -> None:
    code = (
        "import sys\nfrom hf_compress.cli.app import main\ntry:\n    main(['cache', 'push', '--help'])\nexcept SystemExit:\n    pass\n"
        "print('loaded', *sorted({'torch', 'transformers', 'numpy', 'huggingface_hub', 'safetensors'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "loaded" and "USER/NAME" in done.stdout
