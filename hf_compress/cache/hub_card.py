"""The data set card of a cache on the hub: whose knowledge it is, how to train from it, and what can be read out of it."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from typing import Any

from hf_compress.cache.fields import field_of, stored_signals, vector_words
from hf_compress.cache.hub_address import HubAddress
from hf_compress.cache.manifest import Manifest, TeacherIdentity
from hf_compress.cache.predictions import TopK
from hf_compress.cache.price import readable
from hf_compress.cache.selection import Selection

# A card with this line is ours, and is written anew.
OURS = "<!-- Written by `hf-compress cache push`, and anew at each push. To keep words of your own, delete this line. -->"

_CARD = """\
---
pretty_name: {quoted}
tags:
- hf_compress
- teacher-cache
- knowledge-distillation
viewer: false
---

{ours}

# {title}

What the teacher **{name}** says of {examples} training examples, computed once and stored by hf_compress. A student learns from it with no
teacher loaded.

| | |
|---|---|
{table}

## Train from it

```
hf-compress run SCRIPT.py --model_name_or_path STUDENT --trainer_class DistillTrainer \\
    --teacher_cache_dir {address} ...
```

or, in Python, `CompressionArguments(teacher_cache_dir="{address}")`.
It is downloaded once, and checked to the last byte. The training data are not in it: bring the same data, tokenized in the same way
with the teacher's tokenizer.

## What is in it

A model's outputs on its training data: the signals above, in safetensors files. There are no texts in it and no token ids. An example is
found by a key of 128 bits, a hash of its token ids; so whoever has a text can find out whether it is among the examples, and a model's
outputs tell something of what it read. Where the data are confidential, keep this repository private. What may be done with it follows
from the licences of the teacher and of the data.
"""


def card(manifest: Manifest, address: HubAddress) -> str:
    """The text of README.md.

    Args:
        manifest: of the cache.
        address: where it goes.
    """
    name = public_name(manifest.teacher.name)
    entries = dict(manifest.selection)
    codec = entries.pop("codec", "")
    signals = signal_words(manifest)
    rows = {
        "teacher": f"{name}, {_sizes(manifest.teacher)}",
        "its own scores": ", ".join(
            f"{metric.removeprefix('teacher_')} {score:.4g}" for metric, score in sorted(manifest.teacher.scores.items())
        ),
        "labels": ", ".join(manifest.teacher.labels) if len(manifest.teacher.labels) <= 20 else f"{len(manifest.teacher.labels)}",
        "signals": "; ".join(signals),
        "selection": Selection.from_json(entries).describe() if any("hidden" in words for words in signals) else "",
        "number format": str(codec),
        "examples": f"{manifest.examples:,}, {manifest.tokens:,} tokens",
        "size": f"{readable(manifest.bytes)}, {manifest.bytes / manifest.examples:,.0f} bytes an example",
        "recipe": recipe_flags(manifest.distillation) or "the default, or losses given in Python",
        "made": f"{manifest.created[:10]}, by hf_compress {manifest.hf_compress_version}",
    }
    title = f"Teacher on disk: {address.folder or address.repo.partition('/')[2]}"
    return _CARD.format(
        title=title,
        quoted=json.dumps(title),
        ours=OURS,
        name=name,
        examples=f"{manifest.examples:,}",
        table="\n".join(f"| {row} | {_cell(words)} |" for row, words in rows.items() if words),
        address=address,
    )


def public_name(name: str) -> str:
    """A teacher's name, without the folders of somebody's disk."""
    return os.path.basename(name.rstrip("/")) if os.path.isabs(name) or name.startswith((".", "~")) else name


def recipe_flags(distillation: Mapping[str, Any]) -> str:
    """What a cache was built for, as the flags that a later run need not repeat."""
    words = []
    for name, value in distillation.items():
        if not name.startswith("distill_"):
            continue
        if isinstance(value, dict):
            between = ":" if name == "distill_layer_map" else "="
            value = ",".join(f"{key}{between}{number}" for key, number in value.items())
        elif isinstance(value, list):
            value = ",".join(":".join(map(str, pair)) for pair in value)
        words.append(f"--{name} {value}")
    return " ".join(words)


def signal_words(manifest: Manifest) -> list[str]:
    """What is stored of each example, as in "hidden states of layer 2, 4"."""
    spec = stored_signals([column.name for column in manifest.columns])
    top = TopK.of(manifest.columns)
    named = ([top.describe()] if top else ["logits"]) if spec.logits else []
    for words, keys in (("hidden states of layer", spec.hidden_states), ("attention scores of layer", spec.attention_scores)):
        layers = sorted((key.stack, key.layer) for key in keys)
        if layers:
            named.append(f"{words} " + ", ".join(f"{layer}" if stack == "layers" else f"{stack}.{layer}" for stack, layer in layers))
    return named + vector_words([field_of(key) for key in spec.attention_vectors])


def _sizes(teacher: TeacherIdentity) -> str:
    layers = ", ".join(
        f"{size['num_layers']} layers x {size['hidden_size']}" + (f" ({stack})" if stack != "layers" else "")
        for stack, size in teacher.stacks.items()
    )
    return f"{teacher.model_class}, {layers}, {teacher.dtype}"


def _cell(words: str) -> str:
    return words.replace("|", "\\|").replace("\n", " ")
