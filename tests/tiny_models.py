"""Tiny models of every architecture, built from configs: no network, a few thousand parameters, no dropout, evaluation mode.

`TINY` is a table: to add an architecture, add a row.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import transformers
from peft import LoraConfig, get_peft_model
from transformers import PreTrainedConfig, PreTrainedModel

VOCABULARY = 50
WIDTH = 16
IMAGE = 8

HEADS = {
    "sequence_classification": "ForSequenceClassification",
    "token_classification": "ForTokenClassification",
    "question_answering": "ForQuestionAnswering",
    "multiple_choice": "ForMultipleChoice",
    "masked_lm": "ForMaskedLM",
    "causal_lm": "ForCausalLM",
    "seq2seq_lm": "ForConditionalGeneration",
    "image_classification": "ForImageClassification",
    "base": "Model",
}
UNUSUAL_CLASSES = {
    ("gpt2", "causal_lm"): "GPT2LMHeadModel",
    ("xlnet", "causal_lm"): "XLNetLMHeadModel",
    ("distilbert", "base"): "DistilBertModel",
    ("xlnet", "question_answering"): "XLNetForQuestionAnsweringSimple",
}


@dataclass(frozen=True)
class Tiny:
    """One architecture: its class prefix, the names of its depths, its config, and the head that stands for it."""

    prefix: str
    depth_names: tuple[str, ...]
    config: dict[str, Any] = field(default_factory=dict)
    head: str = "sequence_classification"


BERT_LIKE: dict[str, Any] = {
    "hidden_size": WIDTH,
    "num_attention_heads": 2,
    "intermediate_size": 24,
    "max_position_embeddings": 40,
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
}
LLAMA_LIKE: dict[str, Any] = {
    "hidden_size": WIDTH,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 8,
    "intermediate_size": 24,
    "max_position_embeddings": 40,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
TINY: dict[str, Tiny] = {
    "bert": Tiny("Bert", ("num_hidden_layers",), BERT_LIKE),
    "roberta": Tiny("Roberta", ("num_hidden_layers",), {**BERT_LIKE, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}),
    "distilbert": Tiny(
        "DistilBert",
        ("n_layers",),
        {
            "dim": WIDTH,
            "n_heads": 2,
            "hidden_dim": 24,
            "dropout": 0.0,
            "attention_dropout": 0.0,
            "seq_classif_dropout": 0.0,
            "max_position_embeddings": 40,
        },
    ),
    "xlnet": Tiny(
        "XLNet",
        ("n_layer",),
        {"d_model": WIDTH, "n_head": 2, "d_inner": 24, "dropout": 0.0, "summary_last_dropout": 0.0, "pad_token_id": 0},
    ),
    "electra": Tiny("Electra", ("num_hidden_layers",), {**BERT_LIKE, "embedding_size": WIDTH}),
    "albert": Tiny(
        "Albert",
        ("num_hidden_layers",),
        {**BERT_LIKE, "embedding_size": 8, "classifier_dropout_prob": 0.0, "bos_token_id": 1, "eos_token_id": 2},
    ),
    "deberta-v2": Tiny(
        "DebertaV2",
        ("num_hidden_layers",),
        {**BERT_LIKE, "relative_attention": True, "pos_att_type": ["p2c", "c2p"], "position_buckets": 8},
    ),
    "deberta-v2-conv": Tiny(
        "DebertaV2",
        ("num_hidden_layers",),
        {**BERT_LIKE, "relative_attention": True, "pos_att_type": ["p2c", "c2p"], "position_buckets": 8, "conv_kernel_size": 3},
    ),
    "mpnet": Tiny("MPNet", ("num_hidden_layers",), {**BERT_LIKE, "pad_token_id": 1, "bos_token_id": 0, "eos_token_id": 2}),
    "modernbert": Tiny(
        "ModernBert",
        ("num_hidden_layers",),
        {
            "hidden_size": WIDTH,
            "num_attention_heads": 2,
            "intermediate_size": 24,
            "max_position_embeddings": 40,
            "local_attention": 4,
            "pad_token_id": 0,
            "bos_token_id": 1,
            "eos_token_id": 2,
            "cls_token_id": 1,
            "sep_token_id": 2,
        },
    ),
    "gpt2": Tiny(
        "GPT2",
        ("n_layer",),
        {
            "n_embd": WIDTH,
            "n_head": 2,
            "n_inner": 24,
            "n_positions": 40,
            "resid_pdrop": 0.0,
            "embd_pdrop": 0.0,
            "attn_pdrop": 0.0,
            "pad_token_id": 0,
            "bos_token_id": 1,
            "eos_token_id": 2,
        },
    ),
    "llama": Tiny("Llama", ("num_hidden_layers",), LLAMA_LIKE),
    "qwen3": Tiny("Qwen3", ("num_hidden_layers",), {**LLAMA_LIKE, "use_sliding_window": True, "sliding_window": 4, "max_window_layers": 2}),
    "t5": Tiny(
        "T5",
        ("num_layers", "num_decoder_layers"),
        {
            "d_model": WIDTH,
            "num_heads": 2,
            "d_kv": 8,
            "d_ff": 24,
            "dropout_rate": 0.0,
            "pad_token_id": 0,
            "decoder_start_token_id": 0,
            "eos_token_id": 1,
        },
        head="seq2seq_lm",
    ),
    "bart": Tiny(
        "Bart",
        ("encoder_layers", "decoder_layers"),
        {
            "d_model": WIDTH,
            "encoder_attention_heads": 2,
            "decoder_attention_heads": 2,
            "encoder_ffn_dim": 24,
            "decoder_ffn_dim": 24,
            "dropout": 0.0,
            "max_position_embeddings": 40,
            "pad_token_id": 0,
            "bos_token_id": 1,
            "eos_token_id": 2,
            "decoder_start_token_id": 2,
            "forced_eos_token_id": None,
        },
        head="seq2seq_lm",
    ),
    "vit": Tiny(
        "ViT", ("num_hidden_layers",), {**BERT_LIKE, "image_size": IMAGE, "patch_size": 4, "num_channels": 1}, head="image_classification"
    ),
}
ARCHITECTURES = list(TINY)


def tiny_config(architecture: str, *, num_layers: int = 4, **config: Any) -> PreTrainedConfig:
    """The config of a tiny model; `config` overrides any value of it."""
    tiny = TINY[architecture]
    values = {**tiny.config, **dict.fromkeys(tiny.depth_names, num_layers), **config}
    if architecture == "vit":
        values.pop("max_position_embeddings", None)
    else:
        values.setdefault("vocab_size", VOCABULARY)
    made: PreTrainedConfig = getattr(transformers, f"{tiny.prefix}Config")(**values)
    return made


def tiny_model(architecture: str, *, num_layers: int = 4, head: str | None = None, seed: int = 0, **config: Any) -> PreTrainedModel:
    """A tiny model in evaluation mode, the same for the same seed.

    `head` is one of `HEADS`; without it the one that stands for the architecture (sequence classification, but seq2seq
    for T5 and BART and image classification for ViT).
    """
    head = head or TINY[architecture].head
    name = UNUSUAL_CLASSES.get((architecture, head), TINY[architecture].prefix + HEADS[head])
    made_config = tiny_config(architecture, num_layers=num_layers, **config)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model: PreTrainedModel = getattr(transformers, name)(made_config)
        for parameter in model.parameters():  # Larger than usual, so that each layer changes its input and biases are not 0.
            parameter.data += 0.1 * torch.randn_like(parameter)
    return model.eval()


def tiny_batch(
    model: torch.nn.Module, batch_size: int = 3, lengths: Sequence[int] = (7, 5, 4), *, labels: bool = False, seed: int = 0
) -> dict[str, torch.Tensor]:
    """A batch for a tiny model: `lengths` are repeated to `batch_size`, padded on the right.

    Gives input_ids and attention_mask (batch, time), decoder_input_ids for encoder-decoders, or pixel_values
    (batch, 1, 8, 8) for ViT, and labels that fit the head if asked for.
    """
    generator = torch.Generator().manual_seed(seed)
    config: Any = model.config
    if "ViT" in type(config).__name__:
        batch = {"pixel_values": torch.randn(batch_size, config.num_channels, config.image_size, config.image_size, generator=generator)}
        return {**batch, "labels": torch.randint(config.num_labels, (batch_size,), generator=generator)} if labels else batch
    rows = [lengths[row % len(lengths)] for row in range(batch_size)]
    attention_mask = torch.tensor([[int(column < length) for column in range(max(rows))] for length in rows])
    input_ids = torch.randint(3, config.vocab_size, attention_mask.shape, generator=generator)
    input_ids = input_ids.where(attention_mask == 1, config.pad_token_id if config.pad_token_id is not None else 0)
    batch = {"input_ids": input_ids, "attention_mask": attention_mask}
    kind = type(model).__name__
    if config.is_encoder_decoder and not labels:
        batch["decoder_input_ids"] = torch.randint(3, config.vocab_size, (batch_size, 5), generator=generator)
    if labels:
        if "SequenceClassification" in kind:
            batch["labels"] = torch.randint(config.num_labels, (batch_size,), generator=generator)
        elif "TokenClassification" in kind:
            batch["labels"] = torch.randint(config.num_labels, input_ids.shape, generator=generator).where(attention_mask == 1, -100)
        elif "QuestionAnswering" in kind:
            batch["start_positions"] = torch.zeros(batch_size, dtype=torch.long)
            batch["end_positions"] = torch.ones(batch_size, dtype=torch.long)
        else:
            batch["labels"] = input_ids.where(attention_mask == 1, -100)
    return batch


def with_lora(model: PreTrainedModel, **config: Any) -> Any:
    """A LoRA adapter that does something: its second matrix is not 0."""
    wrapped = get_peft_model(model, LoraConfig(r=2, **config))
    for name, parameter in wrapped.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(std=0.3)
    return wrapped.eval()
