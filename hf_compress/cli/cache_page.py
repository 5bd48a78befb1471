"""The page of `hf-compress cache info`: what there is to say of a teacher on disk, as facts for JSON and as lines for people."""

from __future__ import annotations

import fcntl
import math
import shlex
from dataclasses import asdict
from pathlib import Path
from typing import Any

from hf_compress.cache.draft import FILE_NAME as DRAFT_FILE
from hf_compress.cache.fields import field_of, stored_signals, vector_words
from hf_compress.cache.files import read_file
from hf_compress.cache.hub_card import recipe_flags
from hf_compress.cache.lock import FILE_NAME as LOCK_FILE
from hf_compress.cache.manifest import MANIFEST_FILE, Manifest
from hf_compress.cache.predictions import TopK, top_facts
from hf_compress.cache.price import readable
from hf_compress.cache.reader import StoredHow
from hf_compress.cache.selection import Selection
from hf_compress.cache.shard import KEYS
from hf_compress.cache.strict_json import parse
from hf_compress.cache.tensor_file import TensorFile
from hf_compress.errors import CacheError

_SIZES = ("num_layers", "hidden_size", "num_attention_heads")


def facts_of(folder: Path) -> dict[str, Any]:
    """What there is to say of a cache, finished or not, in plain JSON.

    Raises:
        CacheError: if there is no cache, or its manifest is damaged.
    """
    unfinished_here = (folder / DRAFT_FILE).exists() and not (folder / MANIFEST_FILE).exists()
    return _unfinished(folder) if unfinished_here else facts_of_finished(folder, Manifest.load(folder))


def facts_of_finished(folder: Path | str, manifest: Manifest) -> dict[str, Any]:
    """What there is to say of a finished cache, from its manifest: in a folder, or on the Hugging Face hub."""
    stored = StoredHow.of(manifest)
    spec = stored_signals([column.name for column in manifest.columns])
    return {
        "folder": str(folder),
        "finished": True,
        "teacher": asdict(manifest.teacher),
        "tokenizer": manifest.tokenizer,
        "selection": str(stored.selection),
        "selection_in_words": stored.selection.describe(),
        "codec": stored.codec,
        "logits": spec.logits,
        "top_logits": top_facts(manifest.columns),
        "hidden_states": sorted((field_of(key) for key in spec.hidden_states), key=_by_layer),
        "attention_scores": sorted((field_of(key) for key in spec.attention_scores), key=_by_layer),
        "attention_vectors": sorted(field_of(key) for key in spec.attention_vectors),
        "knowledge": _knowledge(manifest),
        "examples": manifest.examples,
        "tokens": manifest.tokens,
        "bytes": manifest.bytes,
        "bytes_an_example": manifest.bytes / manifest.examples,
        "shards": len(manifest.shards),
        "appended": manifest.appended,
        "created": manifest.created,
        "hf_compress_version": manifest.hf_compress_version,
        "distillation": manifest.distillation,
        "next": f"hf-compress run SCRIPT.py --model_name_or_path STUDENT --trainer_class DistillTrainer "
        f"--teacher_cache_dir {shlex.quote(str(folder))} ...",
    }


def _unfinished(folder: Path) -> dict[str, Any]:
    """What there is to say of a build that was stopped, or is going on."""
    draft: Any = parse(read_file(folder / DRAFT_FILE, 1 << 24), str(folder / DRAFT_FILE))
    done, damaged, size = [], [], 0
    for path in sorted(folder.glob("shard-*.safetensors")):
        try:
            done.append(TensorFile(path).tensors[KEYS].shape[0])
            size += path.stat().st_size
        except (CacheError, KeyError):
            damaged.append(path.name)
    try:
        selection = Selection.from_json(draft["selection"])
        signals, teacher, examples = draft["signals"], draft["teacher"], int(draft["examples"]["count"])
        return {
            "folder": str(folder),
            "finished": False,
            "builder": _builder(folder),
            "teacher": {
                **{name: str(teacher[name]) for name in ("model_class", "weights", "dtype")},
                "stacks": {stack: {name: int(size[name]) for name in _SIZES} for stack, size in teacher["stacks"].items()},
            },
            "tokenizer": str(draft["tokenizer"]),
            "selection": str(selection),
            "selection_in_words": selection.describe(),
            "codec": str(draft["codec"]),
            "logits": bool(signals["logits"]),
            "top_logits": signals.get("top_logits"),
            "hidden_states": sorted(signals["hidden_states"], key=_by_layer),
            "attention_scores": sorted(signals["attention_scores"], key=_by_layer),
            "attention_vectors": sorted(signals.get("attention_vectors", [])),
            "examples": examples,
            "examples_done": sum(done),
            "bytes": size,
            "shards": len(done),
            "damaged": damaged,
            "distillation": dict(draft["distillation"]),
            "next": "start the command again that began it (--teacher_model_name_or_path TEACHER "
            f"--teacher_cache_dir {shlex.quote(str(folder))}): what is there is kept",
        }
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise CacheError(
            f"{folder / DRAFT_FILE} is no plan that hf_compress wrote ({type(error).__name__}: {error}). Delete the folder, and build "
            "the cache again."
        ) from error


def _builder(folder: Path) -> str | None:
    """Who is building there now."""
    try:
        with (folder / LOCK_FILE).open() as file:
            try:
                fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
            except OSError:
                return file.read().strip() or "another process"
    except FileNotFoundError:
        pass
    return None


def _knowledge(manifest: Manifest) -> dict[str, float] | None:
    """Which share of the teacher's hidden states is stored: all of its layers and the embedding output are 1; None without any."""
    held: dict[str, dict[str, int]] = {}
    for column in manifest.columns:
        kind, _, rest = column.name.partition(".")
        if kind == "hidden_states" and rest.endswith(".values"):
            stack, layer, _ = rest.split(".")
            rows = sum(shard.rows[column.group] for shard in manifest.shards)
            held.setdefault(stack, {})[layer] = rows * math.prod(column.item)
    if not held:
        return None
    shapes = {stack: manifest.teacher.stacks[stack] for stack in held}
    layers = sum(map(len, held.values())), sum(shape["num_layers"] + 1 for shape in shapes.values())
    numbers = sum(sum(by_layer.values()) for by_layer in held.values())
    whole = sum((shape["num_layers"] + 1) * shape["hidden_size"] * max(1, manifest.tokens) for shape in shapes.values())
    return {"layers": layers[0], "of_layers": layers[1], "share": numbers / whole}


def page_of(facts: dict[str, Any]) -> str:
    """The facts, a line each."""
    teacher, finished = facts["teacher"], facts["finished"]
    layers = ", ".join(
        f"{size['num_layers']} layers x {size['hidden_size']}" + (f" ({stack})" if stack != "layers" else "")
        for stack, size in teacher["stacks"].items()
    )
    name = teacher["name"] if finished else f"weights {teacher['weights'][:8]}"
    rows = [
        ("teacher", f"{name} ({teacher['model_class']}, {layers}, {teacher['dtype']})"),
        ("tokenizer", facts["tokenizer"][:8] or "not known"),
        ("selection", facts["selection_in_words"] if facts["hidden_states"] else "no hidden states"),
        ("codec", facts["codec"]),
        ("signals", "; ".join(_signals(facts))),
        *(_of_finished(facts) if finished else _of_unfinished(facts)),
    ]
    rows.append(("recipe", recipe_flags(facts["distillation"]) or "the default, or losses given in Python"))
    rows.append(("train" if finished else "go on", facts["next"]))
    title = f"{facts['folder']}: a teacher on disk" + ("" if finished else ", not finished")
    return "\n".join([title, "", *(f"{name:<11}{text}" for name, text in rows)])


def _of_finished(facts: dict[str, Any]) -> list[tuple[str, str]]:
    scores = ", ".join(f"{name.removeprefix('teacher_')} {score:.4g}" for name, score in facts["teacher"]["scores"].items())
    rows = [("scores", scores or "not known")]
    if (knowledge := facts["knowledge"]) is not None:
        of = f"{knowledge['layers']} of {knowledge['of_layers']} layers, counting the embedding output"
        rows.append(("knowledge", f"{100 * knowledge['share']:.3g}% of the teacher's hidden states ({of})"))
    shards = _plural(facts["shards"], "shard") + (f", {facts['appended']:,} of them appended" if facts["appended"] else "")
    return [
        *rows,
        ("examples", f"{facts['examples']:,}, {facts['tokens']:,} tokens"),
        ("size", f"{readable(facts['bytes'])}, {facts['bytes_an_example']:,.0f} bytes an example, in {shards}"),
        ("created", f"{facts['created']}, by hf_compress {facts['hf_compress_version']}"),
    ]


def _of_unfinished(facts: dict[str, Any]) -> list[tuple[str, str]]:
    share = f"{100 * facts['examples_done'] / max(1, facts['examples']):.0f}%"
    examples = f"{facts['examples_done']:,} of {facts['examples']:,} examples ({share})"
    rows = [
        ("done", f"{_plural(facts['shards'], 'shard')}, {examples}, {readable(facts['bytes'])}"),
        ("building", f"now, by {facts['builder']}" if facts["builder"] else "nobody: it was stopped"),
    ]
    if facts["damaged"]:
        rows.append(("damaged", f"{', '.join(facts['damaged'])}: built anew when the build goes on"))
    return rows


def _signals(facts: dict[str, Any]) -> list[str]:
    named = [_logits(facts["top_logits"])] if facts["logits"] else []
    for kind, words in (("hidden_states", "hidden states of layer"), ("attention_scores", "attention scores of layer")):
        layers = [name.removeprefix(f"{kind}.").removeprefix("layers.") for name in facts[kind]]
        if layers:
            named.append(f"{words} {', '.join(layers)}")
    return named + vector_words(facts["attention_vectors"])


def _logits(top: dict[str, Any] | None) -> str:
    """Whole ones, or what is kept of them."""
    if top is None:
        return "logits"
    words = TopK(int(top["k"]), tuple(top["temperatures"])).describe()
    return words + (f", {top['bytes_a_token']:,} bytes a token" if "bytes_a_token" in top else "")


def _by_layer(name: str) -> tuple[str, int]:
    stack, _, layer = name.rpartition(".")
    return stack, int(layer)


def _plural(count: int, word: str) -> str:
    return f"{count:,} {word}" + ("" if count == 1 else "s")
