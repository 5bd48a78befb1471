"""Predictions compared some tokens at a time: the values and gradients of whole logits, which are never made."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten

from hf_compress.arguments import CompressionArguments
from hf_compress.chunked_logits import ChunkedLogits, ChunkSettings
from hf_compress.distillation import Distillation
from hf_compress.errors import LossError
from hf_compress.losses.hidden_states import HiddenStatesLoss
from hf_compress.losses.labels import LabelsLoss
from hf_compress.losses.logits import LogitsKind, LogitsLoss
from hf_compress.losses.loss import Loss
from hf_compress.losses.reduction import Batch
from hf_compress.signals import Signals
from hf_compress.task import ModelShape
from hf_compress.task_loss import labels_mean
from hf_compress.teacher import LiveTeacher
from hf_compress.trainer import DistillTrainer
from tests.tiny_models import LLAMA_LIKE, VOCABULARY, tiny_batch, tiny_model
from tests.tiny_runs import arguments, rows, weights

GEMMA = {**LLAMA_LIKE, "num_hidden_layers": 2, "vocab_size": VOCABULARY}


class PlainTrainer:
    compute_loss_func = None
    label_smoother = None


class Outcome:
    """One forward and backward: the parts of the loss, gradients, and the student's own logits."""

    def __init__(self, student: nn.Module, teacher: nn.Module, batch: dict[str, Tensor], chunk_size: int, losses: list[Loss]) -> None:
        student = copy.deepcopy(student).train()
        distillation = Distillation(student, losses, LiveTeacher(teacher), {None: ModelShape.of(teacher)}, chunks=ChunkSettings(chunk_size))
        distillation.start()
        counts = distillation.counts([batch], torch.device("cpu"))
        signals = distillation.teacher_signals(batch)
        distillation.show(signals, batch)
        outputs = student(**{name: value for name, value in batch.items() if name != "labels" or distillation.needs_labels})

        def own_loss(outputs: Any, count: Tensor) -> Tensor:
            return labels_mean(PlainTrainer, student, outputs, batch, count)

        parts = distillation.parts(outputs, signals, batch, counts, own_loss)
        sum(value * weight for value, weight in parts.values()).backward()
        distillation.stop()
        self.parts = {name: value.item() for name, (value, _) in parts.items()}
        self.gradients = {name: each.grad for name, each in student.named_parameters() if each.grad is not None}
        self.logits = outputs["logits"].shape


def softly_capped(seed: int) -> Any:
    torch.manual_seed(seed)
    return transformers.Gemma2ForCausalLM(transformers.Gemma2Config(**GEMMA, final_logit_softcapping=0.3)).eval()


def divided(seed: int) -> Any:
    torch.manual_seed(seed)
    return transformers.GraniteForCausalLM(transformers.GraniteConfig(**GEMMA, logits_scaling=0.2)).eval()


def pair(name: str) -> tuple[Any, Any]:
    if name in ("gemma2", "granite"):
        return (softly_capped(1), softly_capped(2)) if name == "gemma2" else (divided(1), divided(2))
    architecture, head = name.split("-")
    return tiny_model(architecture, num_layers=2, head=head, seed=1), tiny_model(architecture, num_layers=3, head=head, seed=2)


def batch_of(model: Any) -> dict[str, Tensor]:
    """Three examples of 7, 5 and 4 tokens, some of which have no label."""
    batch = tiny_batch(model, labels=True)
    batch["labels"][0, 2:4] = -100
    return batch


# GPT-2's and BERT's heads are tied to the embeddings, Llama's is not; BERT's and ModernBERT's have a bias.
@pytest.mark.parametrize("name", ["gpt2-causal_lm", "llama-causal_lm", "bert-masked_lm", "modernbert-masked_lm", "gemma2", "granite"])
def test_chunks_give_the_values_and_gradients_of_whole_logits(name: str) -> None:
    student, teacher = (model.double() for model in pair(name))
    losses: list[Loss] = [LogitsLoss(3.0), LabelsLoss(weight=0.5)]
    whole = Outcome(student, teacher, batch_of(student), 0, losses)
    assert whole.logits == (3, 7, VOCABULARY) and whole.parts["logits"] > 1e-3
    for chunk_size in (3, 1000):
        chunked = Outcome(student, teacher, batch_of(student), chunk_size, losses)
        assert chunked.logits == (3, 1, VOCABULARY)
        assert chunked.parts == pytest.approx(whole.parts, rel=1e-6)  # models take their own label loss in float32
        assert chunked.gradients.keys() == whole.gradients.keys()
        for parameter, gradient in whole.gradients.items():
            assert torch.allclose(chunked.gradients[parameter], gradient, rtol=1e-5, atol=1e-7), parameter


@pytest.mark.parametrize("name", ["gpt2-causal_lm", "bert-masked_lm", "modernbert-masked_lm", "gemma2"])
def test_hardly_any_logits_are_made_where_no_loss_reads_them(name: str) -> None:
    student, teacher = (model.double() for model in pair(name))
    read: list[int] = []
    teacher.get_output_embeddings().register_forward_hook(lambda module, args, output: read.append(args[0].shape[1]))
    whole, unread = (Outcome(student, teacher, batch_of(student), size, [HiddenStatesLoss()]) for size in (0, 3))
    assert unread.parts == pytest.approx(whole.parts, rel=1e-12) and whole.parts["hidden_states"] > 1e-3
    assert unread.gradients.keys() == whole.gradients.keys()
    for parameter, gradient in whole.gradients.items():
        assert torch.allclose(unread.gradients[parameter], gradient, atol=1e-12), parameter
    assert whole.logits == (3, 7, VOCABULARY) and unread.logits == (3, 1, VOCABULARY)
    assert read == [1, 1]


def test_a_head_that_is_never_called_is_let_be() -> None:
    # MobileBERT's forward multiplies by parts of its head.
    sizes = {
        "hidden_size": 32,
        "embedding_size": 16,
        "attention_probs_dropout_prob": 0.0,
        "intra_bottleneck_size": 16,
        "intermediate_size": 32,
        "num_attention_heads": 2,
    }
    config = transformers.MobileBertConfig(vocab_size=VOCABULARY, num_hidden_layers=2, **sizes)
    torch.manual_seed(0)
    student, teacher = (transformers.MobileBertForMaskedLM(config).eval() for _ in range(2))
    whole, unread = (Outcome(student, teacher, batch_of(student), size, [HiddenStatesLoss()]) for size in (0, 3))
    assert unread.parts == whole.parts and unread.logits == whole.logits == (3, 7, VOCABULARY)


def test_a_script_that_reads_the_student_besides_gets_all_logits() -> None:
    student, teacher = pair("gpt2-causal_lm")
    distillation = Distillation(
        student.train(), [HiddenStatesLoss()], LiveTeacher(teacher), {None: ModelShape.of(teacher)}, chunks=ChunkSettings(3)
    )
    distillation.start()
    batch = tiny_batch(student)
    assert student(**batch)["logits"].shape[1] == 7
    signals, counts = distillation.teacher_signals(batch), distillation.counts([batch], torch.device("cpu"))
    distillation.show(signals, batch)
    outputs = student(**batch)
    assert outputs["logits"].shape[1] == 1
    distillation.parts(outputs, signals, batch, counts, lambda *_: torch.zeros(()))
    assert student(**batch)["logits"].shape[1] == 7
    distillation.show(signals, batch)
    assert student.eval()(**batch)["logits"].shape[1] == 7
    distillation.stop()
    assert student.train()(**batch)["logits"].shape[1] == 7 and teacher(**batch).logits.shape[1] == 7


@pytest.mark.parametrize("kind", ["kl", "soft_cross_entropy", "mse"])
def test_each_kind_in_double_precision(kind: LogitsKind) -> None:
    student, teacher = (model.double() for model in pair("gpt2-causal_lm"))
    whole, chunked = (Outcome(student, teacher, batch_of(student), size, [LogitsLoss(2.0, kind)]) for size in (0, 5))
    assert chunked.parts == pytest.approx(whole.parts, rel=1e-12)
    for parameter, gradient in whole.gradients.items():
        assert torch.allclose(chunked.gradients[parameter], gradient, atol=1e-12), parameter


def test_gradient_against_numerical_differences() -> None:
    model = tiny_model("gpt2", num_layers=1, head="causal_lm", vocab_size=6, n_embd=4, n_inner=4).double().train()
    ids = torch.tensor([[3, 4, 5], [5, 4, 0]])
    mask = torch.tensor([[1, 1, 1], [1, 1, 0]]).bool()
    loss = LogitsLoss(2.0, task="causal_lm", stack="layers")
    chunked = ChunkedLogits(model, [loss], labels=True, chunk_size=2)
    labels = ids.masked_fill(~mask, -100)
    theirs = Signals(logits={"logits": torch.randn(2, 3, 6, dtype=torch.float64)})
    batch = Batch("causal_lm", 2, {"layers": mask}, labels=labels)

    def sums(head: Tensor) -> tuple[Tensor, ...]:
        chunked.show(batch, theirs)
        outputs = functional_call(model, {"lm_head.weight": head, "transformer.wte.weight": head}, kwargs={"input_ids": ids})
        found = chunked.total(loss, outputs), chunked.total(LabelsLoss(), outputs)
        return tuple(each for each in found if each is not None)

    head = model.lm_head.weight.detach().clone().requires_grad_()
    assert len(sums(head)) == 2
    assert torch.autograd.gradcheck(sums, (head,))


class Largest(TorchDispatchMode):
    """The most numbers that any tensor had which was made meanwhile."""

    def __init__(self) -> None:
        super().__init__()
        self.numbers = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        self.numbers = max(self.numbers, *(each.numel() for each in tree_flatten(made)[0] if isinstance(each, Tensor)), 0)
        return made


def test_no_tensor_is_as_large_as_all_logits() -> None:
    student, teacher = (tiny_model("llama", num_layers=1, head="causal_lm", vocab_size=2000, seed=seed) for seed in (1, 2))
    batch = tiny_batch(student, batch_size=8, lengths=(20, 12), labels=True)
    largest = {}
    for chunk_size in (0, 10):
        with Largest() as made:
            Outcome(student, teacher, batch, chunk_size, [LogitsLoss(), LabelsLoss()])
        largest[chunk_size] = made.numbers
    assert largest == {0: 8 * 20 * 2000, 10: 2000 * 16}  # in chunks, the head's weights


def test_padding_never_reaches_the_head() -> None:
    student, teacher = pair("bert-masked_lm")
    seen: list[int] = []
    model = copy.deepcopy(student)
    distillation = Distillation(
        model.train(), [LogitsLoss()], LiveTeacher(teacher), {None: ModelShape.of(teacher)}, chunks=ChunkSettings(6)
    )
    distillation.start()
    model.get_output_embeddings().register_forward_pre_hook(lambda module, args: seen.append(args[0].shape[:-1].numel()))
    batch = batch_of(student)
    distillation.show(distillation.teacher_signals(batch), batch)
    model(**{name: batch[name] for name in ("input_ids", "attention_mask")})
    assert seen == [3, 6, 6, 4]  # the first token of each of 3 rows, and 16 real ones; not 21


def test_a_loss_on_labels_that_is_not_the_usual_one_is_left_to_the_model() -> None:
    student, teacher = pair("xlnet-causal_lm")  # does not shift its labels
    losses: list[Loss] = [LogitsLoss(), LabelsLoss()]
    whole, chunked = (Outcome(student, teacher, batch_of(student), size, losses) for size in (0, 4))
    assert chunked.logits == (3, 7, VOCABULARY)
    assert chunked.parts == pytest.approx(whole.parts, rel=1e-6)


def test_what_a_model_does_after_its_head_and_nobody_knows_of_is_refused() -> None:
    class Doubling(transformers.GPT2LMHeadModel):
        def forward(self, *args: Any, **kwargs: Any) -> Any:
            outputs = super().forward(*args, **kwargs)
            outputs["logits"] = outputs["logits"] * 2
            return outputs

    plain, teacher = pair("gpt2-causal_lm")
    with pytest.raises(LossError, match=r"in a way of its own.*--distill_logits_chunk_size 0"):
        Outcome(Doubling(plain.config), teacher, batch_of(plain), 4, [LogitsLoss()])


def test_the_rule_for_the_size_of_chunks() -> None:
    large, small = (tiny_model("gpt2", num_layers=1, head="causal_lm", vocab_size=size) for size in (8192, 8191))
    assert ChunkSettings().tokens(large) == 4096  # 128 MiB of float32
    assert ChunkSettings(0).tokens(large) == ChunkSettings().tokens(small) == 0
    assert ChunkSettings(7).tokens(small) == 7
    assert ChunkSettings().tokens(tiny_model("bert")) == 0
    with pytest.raises(LossError, match="--distill_logits_chunk_size 7 is for causal and masked language models"):
        ChunkSettings(7).tokens(tiny_model("bert"))


@pytest.mark.parametrize(("smoothing", "teachers"), [(0.0, 1), (0.1, 1), (0.0, 2)])
def test_a_trainer_learns_the_same_and_evaluates_whole(tmp_path: Path, smoothing: float, teachers: int) -> None:
    data = [{**row, "labels": row["input_ids"]} for row in rows().remove_columns("label")]
    learnt = []
    for chunk_size in (0, 7):
        trainer = DistillTrainer(
            tiny_model("gpt2", num_layers=2, head="causal_lm", seed=2),
            arguments(
                tmp_path, max_steps=3, gradient_accumulation_steps=2, per_device_train_batch_size=4, label_smoothing_factor=smoothing
            ),
            teacher=[tiny_model("gpt2", head="causal_lm", seed=seed) for seed in (1, 7)[:teachers]],
            teacher_weights=(0.8, 0.2)[:teachers],
            losses=[LogitsLoss(), LabelsLoss(weight=0.5)],
            compression=CompressionArguments(distill_logits_chunk_size=chunk_size),
            train_dataset=data,
            eval_dataset=data,
        )
        trainer.train()
        learnt.append(weights(trainer))
        assert trainer.predict(data[:4]).predictions.shape[1:] == (24, VOCABULARY)
        assert not trainer.model._forward_hooks and not trainer.model.lm_head._forward_pre_hooks
    before = dict(tiny_model("gpt2", num_layers=2, head="causal_lm", seed=2).named_parameters())
    for name, tensor in learnt[0].items():
        assert torch.allclose(tensor, learnt[1][name], atol=1e-6), name
    assert max(float((learnt[1][name] - tensor.detach()).abs().max()) for name, tensor in before.items()) > 1e-3
