"""Drop layers of a causal language model, heal it with LoRA, save adapter and base together, load them again, and let it write.

This is the method of "The Unreasonable Ineffectiveness of the Deeper Layers" (Gromov et al., arXiv 2403.17887), for any model of the Llama
or Qwen kind. Without --model_name_or_path a small Llama is trained from nothing first, offline, in a minute or two:

    python examples/heal_llama.py --output_dir healed

    python examples/heal_llama.py --model_name_or_path Qwen/Qwen3-0.6B --train_file text.txt --output_dir healed \\
        --layer_drop_strategy contribution --num_layers_to_drop 8 --distill --learning_rate 3e-4 --num_train_epochs 1

Which layers go is said by the flags of hf_compress: --layer_drop_strategy, --layers_to_drop, --layers_to_keep. Without any of them it is
the paper's simple rule: the deepest quarter, but for the last layer. --distill heals with the whole model as a teacher beside the text
(--distill_recipe logits by default; it takes the whole model's memory as well). All other flags are those of TrainingArguments.

    healed/adapter_config.json, adapter_model.safetensors      the adapter; its config names base_model/
    healed/base_model/                                         the model without the dropped layers
    healed/merged/                                             with --merge: both in one, a plain model
"""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset, load_dataset
from peft import LoraConfig, get_peft_model
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    HfArgumentParser,
    LlamaConfig,
    LlamaForCausalLM,
    Trainer,
    TrainingArguments,
    default_data_collator,
    set_seed,
)

from hf_compress import DistillTrainer, DistillTrainingArguments, load_with_adapters
from hf_compress.report.corpus import write_corpus
from hf_compress.report.tokenizer import train_tokenizer


@dataclass
class HealArguments:
    """What is healed, on which text, with how large an adapter."""

    model_name_or_path: str | None = field(default=None, metadata={"help": "A causal language model; by default a small one is trained."})
    train_file: str | None = field(default=None, metadata={"help": "Plain text to heal on; its last twentieth is for the perplexity."})
    block_size: int = field(default=256, metadata={"help": "Tokens in an example."})
    lora_rank: int = field(default=16, metadata={"help": "Of the adapter's two matrices."})
    lora_target_modules: str = field(
        default="gate_proj,up_proj,down_proj", metadata={"help": "What is adapted, as in the paper the feed-forward part; or all-linear."}
    )
    distill: bool = field(default=False, metadata={"help": "Learn from the whole model as well as from the text."})
    merge: bool = field(default=False, metadata={"help": "Save adapter and base as one plain model too, in merged/."})
    prompt: str = field(default="the room was", metadata={"help": "What the healed model goes on from."})
    small_model_steps: int = field(default=300, metadata={"help": "How long the small model is trained, where none is named."})


def blocks(texts: Sequence[str], tokenizer: Any, block_size: int) -> Dataset:
    """The texts, one after another, cut into examples of `block_size` tokens: input_ids, attention_mask, labels."""
    ids = list(chain.from_iterable(tokenizer(list(texts))["input_ids"]))
    size = min(block_size, len(ids))
    rows = [ids[start : start + size] for start in range(0, len(ids) - size + 1, size)]
    return Dataset.from_dict({"input_ids": rows, "attention_mask": [[1] * size] * len(rows), "labels": rows})


def small_llama(folder: Path, heal: HealArguments, seed: int) -> tuple[str, list[str]]:
    """A Llama of eight layers that has learnt a small language, saved in `folder`; and text of that language."""
    print(f"no --model_name_or_path: a small Llama is trained first, {heal.small_model_steps} steps (--small_model_steps)", flush=True)
    (examples,) = write_corpus([3000], seed=seed)
    texts = [f"{example.review} {example.reply}" for example in examples]
    tokenizer = train_tokenizer(examples)
    sizes = {"hidden_size": 64, "intermediate_size": 172, "num_hidden_layers": 8, "num_attention_heads": 4, "num_key_value_heads": 2}
    special = {"pad_token_id": tokenizer.pad_token_id, "bos_token_id": tokenizer.cls_token_id, "eos_token_id": tokenizer.sep_token_id}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), max_position_embeddings=512, **sizes, **special))
    settings: dict[str, Any] = {"max_steps": heal.small_model_steps, "per_device_train_batch_size": 8, "learning_rate": 3e-3}
    quiet: dict[str, Any] = {"save_strategy": "no", "report_to": [], "disable_tqdm": True, "logging_steps": 100, "seed": seed}
    data = blocks(texts[: len(texts) * 19 // 20], tokenizer, heal.block_size)
    Trainer(model, TrainingArguments(str(folder), **settings, **quiet), train_dataset=data, data_collator=default_data_collator).train()
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder), texts


@torch.no_grad()
def perplexity(model: Any, data: Dataset, batch_size: int = 8) -> float:
    """exp of the mean loss of a token."""
    was_training = model.training
    model.eval()
    losses = []
    for start in range(0, len(data), batch_size):
        rows = data[start : start + batch_size]
        batch = {name: torch.tensor(rows[name], device=model.device) for name in ("input_ids", "attention_mask", "labels")}
        losses += [model(**batch).loss.item()] * len(rows["input_ids"])
    model.train(was_training)
    return math.exp(sum(losses) / len(losses))


def main(argv: Sequence[str] | None = None) -> dict[str, float]:
    """Drop, heal, save, load, write. Returns the perplexities: whole, dropped, healed, and of what was loaded again."""
    heal, args = HfArgumentParser((HealArguments, DistillTrainingArguments)).parse_args_into_dataclasses(
        list(sys.argv[1:] if argv is None else argv)
    )
    set_seed(args.seed)
    if heal.model_name_or_path is None:
        source, texts = small_llama(Path(args.output_dir) / "whole", heal, args.seed)
    elif heal.train_file is None:
        raise SystemExit("--model_name_or_path needs text to heal on: --train_file text.txt")
    else:
        source, texts = heal.model_name_or_path, load_dataset("text", data_files=heal.train_file)["train"]["text"]
    tokenizer = AutoTokenizer.from_pretrained(source)
    number = max(1, len(texts) // 20)
    train, held_out = (blocks(part, tokenizer, heal.block_size) for part in (texts[:-number], texts[-number:]))

    model: Any = AutoModelForCausalLM.from_pretrained(source, dtype="auto").to(args.device)
    found = {"whole": perplexity(model, held_out)}
    depth = model.config.num_hidden_layers
    if not args.wants_layer_drop:
        args.layers_to_drop = list(range(depth - max(1, depth // 4), depth))  # counted from 1: the last layer stays
    if heal.distill:
        args.teacher_model_name_or_path = args.teacher_model_name_or_path or source
        args.distill_recipe = args.distill_recipe or "logits"
    names = heal.lora_target_modules
    lora = LoraConfig(
        task_type="CAUSAL_LM",
        r=heal.lora_rank,
        lora_alpha=2 * heal.lora_rank,
        target_modules=names if names == "all-linear" else names.split(","),
    )
    model = get_peft_model(model, lora)
    model.print_trainable_parameters()

    # The trainer drops the layers, in the base and in the adapter, and saves the dropped base beside the adapter.
    trainer = DistillTrainer(
        model, args, train_dataset=train, eval_dataset=held_out, data_collator=default_data_collator, processing_class=tokenizer
    )
    found["dropped"] = perplexity(model, held_out)
    trainer.train(resume_from_checkpoint=args.resume_from_checkpoint)
    found["healed"] = perplexity(model, held_out)
    trainer.save_model()
    trainer.create_model_card()

    if trainer.is_world_process_zero():
        loaded = load_with_adapters(args.output_dir).to(args.device)
        found["loaded"] = perplexity(loaded, held_out)
        if heal.merge:
            loaded = loaded.merge_and_unload()
            loaded.save_pretrained(Path(args.output_dir) / "merged")
            tokenizer.save_pretrained(Path(args.output_dir) / "merged")
        for name, value in found.items():
            layers = depth if name == "whole" else loaded.config.num_hidden_layers
            print(f"perplexity, {name} ({layers} layers): {value:.2f}")
        prompt = tokenizer(heal.prompt, return_tensors="pt", return_token_type_ids=False).to(args.device)
        if prompt["input_ids"][0, -1] == tokenizer.sep_token_id:  # a tokenizer that ends each text; the model is to go on
            prompt = {name: value[:, :-1] for name, value in prompt.items()}
        written = loaded.generate(**prompt, max_new_tokens=24, do_sample=False)
        print(tokenizer.decode(written[0], skip_special_tokens=True))
    return found


if __name__ == "__main__":
    main()
