"""Who a teacher is, in words and numbers that can be stored: so that a cache is never read as another teacher's."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
import xxhash
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from hf_compress.cache.fields import stored_signals, vector_shapes
from hf_compress.cache.hub_address import is_hub_address
from hf_compress.cache.manifest import MANIFEST_FILE, Manifest, TeacherIdentity
from hf_compress.cache.predictions import TopK
from hf_compress.cache.select import keeps_whole_states
from hf_compress.cache.selection import Selection
from hf_compress.cache.stack_sizes import StackSizes
from hf_compress.errors import TeacherError
from hf_compress.layers.stack import pretrained_model, unwrap
from hf_compress.signals import VECTOR_KINDS, VectorKind
from hf_compress.task import Kind, ModelShape, Stack, kind_of, kind_of_classes
from hf_compress.teacher_checks import labels_of


def identity_of(model: nn.Module, name: str, autocast: str | None, scores: dict[str, float]) -> TeacherIdentity:
    """Describe a teacher.

    Args:
        model: the teacher.
        name: as the user named it.
        autocast: the number format that its forward is cast to, None for none.
        scores: its own, by metric.
    """
    config: Any = pretrained_model(model).config
    stacks = {
        stack: {"num_layers": size.num_layers, "hidden_size": size.hidden_size, "num_attention_heads": size.num_attention_heads}
        for stack, size in ModelShape.of(model).stacks.items()
    }
    own = str(next(model.parameters()).dtype).removeprefix("torch.")
    return TeacherIdentity(
        name=name,
        model_class=type(unwrap(model)).__name__,
        weights=weights_hash(model.state_dict().items()),
        dtype=own if autocast is None else f"{own}, autocast to {autocast}",
        stacks=stacks,
        labels=tuple(labels_of(model)),
        vocab_size=int(getattr(config.get_text_config(), "vocab_size", 0) or 0),
        scores=scores,
    )


def weights_hash(weights: Iterable[tuple[str, Any]]) -> str:
    """XXH3-128 over names, types, shapes and bytes, in the order of names; adapters and the numbers of a quantised model among them.

    A part that an adapter brought along in place of the base's (`modules_to_save`) counts, and the base's own, which is not used, does not.

    Raises:
        TeacherError: a quantised weight that does not show its numbers.
    """
    digest = xxhash.xxh3_128()
    for name, value in sorted(weights, key=lambda item: item[0]):
        if ".original_module." not in name:
            _digest(digest, name, value)
    return digest.hexdigest()


def _digest(digest: xxhash.xxh3_128, name: str, value: Any) -> None:
    """One entry of a state dict: a tensor, or what a quantised layer has in its place, such as packed weights and a name."""
    if isinstance(value, (tuple, list)):
        for number, part in enumerate(value):
            _digest(digest, f"{name}.{number}", part)
    elif isinstance(value, Tensor):
        digest.update(f"{name} {value.dtype} {tuple(value.shape)}\n".encode())
        try:
            plain = value.detach().dequantize() if value.is_quantized else value.detach()
            digest.update(plain.cpu().contiguous().flatten().view(torch.uint8).numpy().data)
        except (NotImplementedError, RuntimeError, TypeError) as error:
            raise TeacherError(
                f"The teacher's {name} ({type(value).__name__}) does not show its numbers, so a teacher on disk could not be told from "
                f"another's ({error}). Distil from it live: leave --teacher_cache_dir out."
            ) from error
    else:
        digest.update(f"{name} {value!r}\n".encode())


def tokenizer_hash(tokenizer: Any) -> str:
    """XXH3-128 over the vocabulary; "" where there is no tokenizer to look at."""
    if not isinstance(tokenizer, PreTrainedTokenizerBase):
        return ""
    words = sorted(tokenizer.get_vocab().items(), key=lambda item: (item[1], item[0]))
    return xxhash.xxh3_128_hexdigest("\n".join(f"{index} {word}" for word, index in words).encode())


def special_ids_of(tokenizer: Any) -> list[int]:
    """The ids that the tokenizer adds around text. An unknown word and a mask stand for words, so they are none."""
    if not isinstance(tokenizer, PreTrainedTokenizerBase):
        return []
    words = {tokenizer.unk_token_id, tokenizer.mask_token_id}
    return sorted(set(tokenizer.all_special_ids) - words)


def shape_of(manifest: Manifest, selection: Selection) -> ModelShape:
    """What losses must know of a stored teacher.

    Args:
        manifest: of its cache.
        selection: what is read of it.
    """
    teacher = manifest.teacher
    part = not keeps_whole_states(selection)
    vectors = vector_shapes({column.name: column.item for column in manifest.columns})
    stacks = {name: _stack(size, vectors.get(name, {}), part) for name, size in teacher.stacks.items()}
    spec = stored_signals([column.name for column in manifest.columns])
    kind = kind_of_classes((teacher.model_class,))
    top = TopK.of(manifest.columns)
    shows = bool(spec.attention_scores), bool(spec.attention_vectors)
    return ModelShape(teacher.model_class, kind, stacks, *shows, top_logits=0 if top is None else top.k)


def _stack(size: Mapping[str, int], vectors: Mapping[VectorKind, tuple[int, int]], selected: bool) -> Stack:
    grouped = vectors.get("keys") or vectors.get("values") or (0, 0)
    head_size = next((width for _, width in vectors.values()), 0)
    return Stack(
        size["num_layers"],
        size["hidden_size"],
        size["num_attention_heads"],
        selected=selected,
        num_key_value_heads=grouped[0],
        head_size=head_size,
    )


def refuse_several_stacks(shape: ModelShape) -> None:
    """Raise TeacherError: what an encoder-decoder says of an example hangs on two texts, and a record on disk is of one."""
    if len(shape.stacks) != 1:
        raise TeacherError(
            f"The teacher, a {shape.name}, has several stacks of layers ({', '.join(shape.stacks)}), and is not stored on disk. Distil "
            "from it live: leave --teacher_cache_dir out."
        )


def stack_sizes(shape: ModelShape) -> dict[str, StackSizes]:
    """What of a teacher's sizes decides what it takes on disk."""
    return {
        name: StackSizes(stack.hidden_size, stack.num_attention_heads, {kind: stack.vectors(kind) for kind in VECTOR_KINDS})
        for name, stack in shape.stacks.items()
    }


def logits_shapes(model: nn.Module) -> dict[str, tuple[int, ...]]:
    """The shape of one example's logits by name; -1 stands for its tokens.

    Raises:
        TeacherError: for a head whose logits are of no known shape.
    """
    kind: Kind = kind_of(model)
    config: Any = pretrained_model(model).config
    labels = int(config.num_labels or 0)
    vocabulary = int(getattr(config.get_text_config(), "vocab_size", 0) or 0)
    shapes: dict[Kind, dict[str, tuple[int, ...]]] = {
        "sequence_classification": {"logits": (labels,)},
        "token_classification": {"logits": (-1, labels)},
        "multiple_choice": {"logits": (1,)},  # each choice is stored by itself
        "question_answering": {"start_logits": (-1,), "end_logits": (-1,)},
        "masked_lm": {"logits": (-1, vocabulary)},
        "causal_lm": {"logits": (-1, vocabulary)},
    }
    if kind not in shapes:
        raise TeacherError(
            f"The predictions of a {type(unwrap(model)).__name__} are not stored on disk yet. Distil from a live teacher (no "
            "--teacher_cache_dir), or leave the logits out (--distill_weights logits=0)."
        )
    return shapes[kind]


def had_head(manifest: Manifest) -> bool:
    """Whether a stored teacher had a head; a language model whose predictions nobody read had none."""
    return kind_of_classes((manifest.teacher.model_class,)) != "other"


def has_cache(folder: str | Path) -> bool:
    """Whether a finished cache lies there. On the hub there is one or an error, told when it is opened: nothing is built there."""
    return is_hub_address(folder) or (Path(folder) / MANIFEST_FILE).exists()
