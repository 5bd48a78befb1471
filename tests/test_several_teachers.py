"""Several teachers: the weighted sum of what each of them alone would teach, live, from disk, or one of each."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from hf_compress.arguments import CompressionArguments
from hf_compress.errors import ArgumentError, CompressionError, LossError, TeacherError
from hf_compress.layers.layer_map import LayerMap
from hf_compress.losses.attention_scores import AttentionScoresLoss
from hf_compress.losses.hidden_states import EmbeddingsLoss, HiddenStatesLoss
from hf_compress.losses.labels import LabelsLoss
from hf_compress.losses.logits import LogitsLoss
from hf_compress.losses.loss import Loss
from hf_compress.losses.reduction import Batch
from hf_compress.signals import Signals
from hf_compress.teacher_places import count_of_teachers, places, shares
from hf_compress.trainer import DistillTrainer
from tests.cached_runs import data, tokenizer
from tests.tiny_models import tiny_model
from tests.tiny_runs import NARROW, arguments, every_loss, largest_difference, rows, student, teacher, weights


def wide() -> nn.Module:
    """A teacher of another depth and width, whose labels are in another order."""
    labels = {"id2label": {0: "B", 1: "A"}, "label2id": {"B": 0, "A": 1}}
    return tiny_model("bert", num_layers=3, seed=9, hidden_size=24, num_attention_heads=2, **labels)


def pupil(**config: Any) -> nn.Module:
    return student(id2label={0: "A", 1: "B"}, label2id={"A": 0, "B": 1}, **config)


def run(folder: Path, guides: Any, model: nn.Module | None = None, *, train: bool = True, **more: Any) -> DistillTrainer:
    flags = {name: more.pop(name) for name in [*more] if name.startswith(("teacher_cache", "hidden", "distill"))}
    given: dict[str, Any] = {"losses": every_loss(), "train_dataset": rows(), **more}
    settings = arguments(folder, **given.pop("settings", {}))
    trainer = DistillTrainer(model or pupil(), settings, teacher=guides, compression=CompressionArguments(**flags), **given)
    if train:
        begin_alike(trainer)
        trainer.train()
    return trainer


def begin_alike(trainer: DistillTrainer) -> None:
    """Projections of one size begin as one, whatever they are called."""
    assert trainer.distillation is not None
    for name, projection in trainer.distillation.projections.items():
        assert isinstance(projection, nn.Linear), name
        with torch.no_grad():
            projection.weight.copy_(torch.randn(projection.weight.shape, generator=torch.Generator().manual_seed(3)) / 4)
            projection.bias.zero_()


def step(trainer: DistillTrainer, start: nn.Module) -> dict[str, Tensor]:
    """How far each weight of the student has moved."""
    before, after = dict(start.named_parameters()), weights(trainer)
    return {name: after[name] - before[name] for name in before}


def test_the_gradient_is_the_weighted_sum_of_each_teachers_own(tmp_path: Path) -> None:
    """Labels count once; each teacher has its depth, width, layer map, projection and order of labels."""
    alone = [step(run(tmp_path / name, [guide], pupil(**NARROW)), pupil(**NARROW)) for name, guide in (("a", teacher()), ("b", wide()))]
    both = run(tmp_path / "both", [teacher(), wide()], pupil(**NARROW), teacher_weights=[3, 1])
    moved = step(both, pupil(**NARROW))
    for name in moved:
        assert torch.allclose(moved[name], 0.75 * alone[0][name] + 0.25 * alone[1][name], atol=2e-7), name
    assert max(change.abs().max().item() for change in moved.values()) > 1e-3
    log = both.state.log_history[0]
    kinds = ("logits", "hidden_states", "embeddings", "attention_scores")
    assert {name for name in log if name.startswith("loss_")} == {f"loss_{kind}_teacher_{k}" for kind in kinds for k in (1, 2)} | {
        "loss_labels"
    }
    parts = sum(log[f"loss_{kind}_teacher_{k}"] * share for kind in kinds for k, share in ((1, 0.75), (2, 0.25)))
    assert log["loss"] == pytest.approx(parts + 0.5 * log["loss_labels"], rel=1e-4)


def test_two_equal_teachers_are_one(tmp_path: Path) -> None:
    settings = {"max_steps": 3}
    one = run(tmp_path / "one", teacher(), settings=settings)
    two = run(tmp_path / "two", [teacher(), teacher()], settings=settings)
    assert largest_difference(weights(one), weights(two)) < 1e-6
    assert largest_difference(weights(one), dict(pupil().named_parameters())) > 1e-3


def test_one_that_weighs_nothing_is_not_loaded(tmp_path: Path) -> None:
    one = run(tmp_path / "one", teacher())
    two = run(tmp_path / "two", ["no-such-model", teacher()], teacher_weights=[0, 2])
    assert one.state.log_history[0].keys() == two.state.log_history[0].keys()
    assert largest_difference(weights(one), weights(two)) == 0.0


def test_the_sum_of_divergences_has_the_gradient_of_the_divergence_from_the_mixture() -> None:
    torch.manual_seed(2)
    ours = torch.randn(5, 3, requires_grad=True)
    theirs, share, temperature = torch.randn(2, 5, 3), (0.7, 0.3), 2.0
    batch = Batch("sequence_classification", 5, {})
    loss = LogitsLoss(temperature=temperature)
    total = torch.stack(
        [w * loss(Signals({"logits": ours}), Signals({"logits": each}), batch) for w, each in zip(share, theirs, strict=True)]
    ).sum()
    mixture = sum(w * (each / temperature).softmax(-1) for w, each in zip(share, theirs, strict=True))
    assert isinstance(mixture, Tensor)
    whole = loss(Signals({"logits": ours}), Signals({"logits": mixture.log() * temperature}), batch)
    found, expected = (torch.autograd.grad(value, ours)[0] for value in (total, whole))
    assert torch.allclose(found, expected, atol=1e-6) and expected.abs().max() > 1e-2
    assert total.item() - whole.item() > 1e-2  # they differ by what does not hang on the student


def test_a_loss_may_name_its_teacher(tmp_path: Path) -> None:
    """The same as two runs with other losses, weighted."""
    first: list[Loss] = [LogitsLoss(), HiddenStatesLoss(LayerMap(((1, 2), (2, 4))), weight=3.0)]
    second: list[Loss] = [LogitsLoss()]
    alone = [
        step(run(tmp_path / name, guide, losses=losses), pupil())
        for name, guide, losses in (("a", teacher(), first), ("b", wide(), second))
    ]
    named = [LogitsLoss(), HiddenStatesLoss(LayerMap(((1, 2), (2, 4))), weight=3.0, teacher=1)]
    both = step(run(tmp_path / "both", [teacher(), wide()], losses=named, teacher_weights=[0.5, 0.5]), pupil())
    for name in both:
        assert torch.allclose(both[name], 0.5 * alone[0][name] + 0.5 * alone[1][name], atol=2e-7), name
    with pytest.raises(LossError, match=r"HiddenStatesLoss\(teacher=3\): there are 2 teachers"):
        run(tmp_path, [teacher(), wide()], losses=[HiddenStatesLoss(teacher=3)])
    with pytest.raises(LossError, match=r"LabelsLoss\(teacher=1\): it asks no teacher"):
        run(tmp_path, [teacher(), wide()], losses=[LogitsLoss(), LabelsLoss(teacher=1)])
    with pytest.raises(LossError, match="Teacher 2 of 2: no loss learns from it"):
        run(tmp_path, [teacher(), wide()], losses=[HiddenStatesLoss(teacher=1)])


# --- on disk ---

CACHED: dict[str, Any] = {"train_dataset": data(), "processing_class": tokenizer()}
DISK: dict[str, Any] = {"teacher_cache_dtype": "float32", **CACHED}
STEPS = {"max_steps": 4, "per_device_train_batch_size": 4, "learning_rate": 0.02}


@pytest.mark.parametrize("workers", [0, pytest.param(2, marks=pytest.mark.slow)])
def test_from_disk_or_live_or_one_of_each_is_the_same(tmp_path: Path, workers: int) -> None:
    def trained(name: str, guides: Sequence[Any], folders: str | None, **settings: Any) -> dict[str, Tensor]:
        more = CACHED if folders is None else {**DISK, "teacher_cache_dir": folders}
        run_ = run(tmp_path / name, guides, pupil(**NARROW), teacher_weights=[0.7, 0.3], settings={**STEPS, **settings}, **more)
        assert run_.state.log_history[0]["loss_hidden_states_teacher_2"] > 0
        return weights(run_)

    a, b = tmp_path / "a", tmp_path / "b"
    live = trained("live", [teacher(), wide()], None)
    built = trained("built", [teacher(), wide()], f"{a},{b}")
    read = trained("read", [None, None], f"{a},{b}", dataloader_num_workers=workers)
    mixed = trained("mixed", [None, wide()], f"{a},")
    assert largest_difference(live, dict(live)) == 0.0 and largest_difference(live, {**weights_at_start(), **maps(live)}) > 1e-3
    for other in (built, read, mixed):
        assert largest_difference(live, other) < 1e-6
    again = DistillTrainer(  # by flags alone, and only the first of them
        pupil(**NARROW),
        arguments(tmp_path / "flags", **STEPS),
        losses=every_loss(),
        compression=CompressionArguments(teacher_cache_dir=f"{a},{tmp_path / 'nothing'}", teacher_weights="1,0"),
        **CACHED,
    )
    again.train()
    assert "loss_logits" in again.state.log_history[0]


def weights_at_start() -> dict[str, Tensor]:
    return {name: parameter.detach() for name, parameter in pupil(**NARROW).named_parameters()}


def maps(found: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor for name, tensor in found.items() if "hf_compress_projections" in name}


def test_each_teacher_on_disk_has_its_own_selection(tmp_path: Path) -> None:
    """Micro-batches of other numbers of selected tokens give the gradient of one batch; the live teacher counts all tokens."""
    losses = [HiddenStatesLoss(weight=2.0)]
    folder = tmp_path / "cache"
    for size, name in (("3t_0.5h", "small"), ("5t", "larger")):
        run(tmp_path / name, teacher(), losses=losses, teacher_cache_dir=str(folder / name), hidden_states_selection=size, **DISK)
    ends = []
    for micro in (1, 4):
        settings = {"per_device_train_batch_size": 16 // micro, "gradient_accumulation_steps": micro}
        three = run(
            tmp_path / f"by-{micro}",
            [None, None, wide()],
            losses=losses,
            teacher_cache_dir=f"{folder / 'small'},{folder / 'larger'},",
            settings=settings,
            **CACHED,
        )
        ends.append((step(three, pupil()), three.state.log_history[0]))
    alone = [
        step(run(tmp_path / f"alone-{n}", guide, losses=losses, teacher_cache_dir=where, **CACHED), pupil())
        for n, (guide, where) in enumerate([(None, str(folder / "small")), (None, str(folder / "larger")), (wide(), None)])
    ]
    for name, moved in ends[0][0].items():
        assert torch.allclose(moved, ends[1][0][name], atol=1e-6), name
        assert torch.allclose(moved, (alone[0][name] + alone[1][name] + alone[2][name]) / 3, atol=1e-6), name
    assert ends[0][1]["loss_hidden_states_teacher_1"] != pytest.approx(ends[0][1]["loss_hidden_states_teacher_2"], rel=0.01)


def test_scores_are_each_teachers_own_and_a_resumed_run_is_the_same(tmp_path: Path) -> None:
    def accuracy(prediction: Any) -> dict[str, float]:
        return {"accuracy": float((prediction.predictions.argmax(-1) == prediction.label_ids).mean())}

    options: dict[str, Any] = {"teacher_weights": [0.7, 0.3], "eval_dataset": rows(), "compute_metrics": accuracy}
    settings = {**STEPS, "save_strategy": "steps", "save_steps": 2}
    unbroken = run(tmp_path / "a", [teacher(), wide()], pupil(**NARROW), settings=settings, **options)
    log = unbroken.state.log_history[0]
    singly = [
        run(tmp_path / str(n), guide, pupil(**NARROW), eval_dataset=rows(), compute_metrics=accuracy).state.log_history[0][
            "teacher_accuracy"
        ]
        for n, guide in enumerate((teacher(), wide()))
    ]
    assert [log["teacher_1_accuracy"], log["teacher_2_accuracy"]] == singly
    resumed = run(tmp_path / "a", [teacher(), wide()], pupil(**NARROW), train=False, settings=settings, **options)
    resumed.train(resume_from_checkpoint=str(tmp_path / "a" / "checkpoint-2"))
    assert largest_difference(weights(unbroken), weights(resumed)) < 1e-6


def test_one_that_lacks_examples_asks_its_own_teacher(tmp_path: Path) -> None:
    """Both read from disk; of the first only half of the data is there."""
    a, b = tmp_path / "a", tmp_path / "b"
    known = {"processing_class": tokenizer(), "teacher_cache_dtype": "float32"}
    run(tmp_path / "half", teacher(), teacher_cache_dir=str(a), train_dataset=data().select(range(8)), **known)
    run(tmp_path / "whole", wide(), teacher_cache_dir=str(b), train_dataset=data(), **known)
    live = run(tmp_path / "live", [teacher(), wide()], settings=STEPS, **CACHED)
    for folder in ("asked", "again"):
        guides = [teacher(), wide()] if folder == "asked" else [None, None]
        more = {**DISK, "teacher_cache_dir": f"{a},{b}", **({"teacher_cache_miss": "live"} if folder == "asked" else {})}
        stored = run(tmp_path / folder, guides, settings=STEPS, **more)
        assert largest_difference(weights(live), weights(stored)) < 1e-6


def test_teachers_built_for_other_weights_of_the_labels_are_refused(tmp_path: Path) -> None:
    folders = []
    for name, weight in (("a", 0.5), ("b", 0.25)):
        folders.append(str(tmp_path / name))
        more = {**DISK, "teacher_cache_dir": folders[-1], "distill_recipe": "logits", "distill_weights": {"labels": weight}}
        run(tmp_path / f"built-{name}", teacher(), losses=None, **more)
    both = {**CACHED, "teacher_cache_dir": ",".join(folders), "losses": None}
    with pytest.raises(ArgumentError, match="weigh the labels differently"):
        run(tmp_path / "both", [None, None], **both)
    said = run(tmp_path / "said", [None, None], distill_recipe="logits", distill_weights="labels=0.75", **both)
    assert {name for name in said.state.log_history[0] if name.startswith("loss_")} == {
        "loss_labels",
        "loss_logits_teacher_1",
        "loss_logits_teacher_2",
    }


def test_a_broken_teacher_is_named(tmp_path: Path) -> None:
    broken = wide()
    with torch.no_grad():
        broken.bert.encoder.layer[1].output.dense.weight.fill_(float("nan"))
    with pytest.raises(TeacherError, match=r"at step 1, in teacher 2's hidden_states"):
        run(tmp_path, [teacher(), broken])


# --- what is refused ---


@pytest.mark.parametrize(
    ("error", "match", "guides", "more"),
    [
        (ArgumentError, "teacher_weights has 3 numbers, and there are 2 teachers", [teacher, wide], {"teacher_weights": [1, 1, 1]}),
        (ArgumentError, "teacher_weights has 2 numbers, and there is one teacher", [teacher], {"teacher_weights": [1, 1]}),
        (ArgumentError, "a weight is 0 .* or more", [teacher, wide], {"teacher_weights": [-1, 2]}),
        (ArgumentError, "one is above 0", [teacher, wide], {"teacher_weights": [0, 0]}),
        (TeacherError, "empty list", [], {}),
        (TeacherError, "Teacher 2 of 2 is not there", [teacher, lambda: None], {}),
        (TeacherError, "other vocabularies", [teacher, lambda: tiny_model("bert", vocab_size=60)], {}),
        (TeacherError, "expected a fine-tuned model", [teacher, lambda: 3], {}),
        (ArgumentError, "1 places, but there are 2 teachers", [teacher, wide], {"teacher_cache_dir": "only-one"}),
    ],
)
def test_refused(
    tmp_path: Path, error: type[CompressionError], match: str, guides: Sequence[Callable[[], Any]], more: dict[str, Any]
) -> None:
    with pytest.raises(error, match=match):
        run(
            tmp_path,
            [guide() for guide in guides],
            **{"losses": [LogitsLoss(), EmbeddingsLoss(), AttentionScoresLoss(), LabelsLoss()], **more},
        )


def test_one_object_twice_is_refused(tmp_path: Path) -> None:
    guide = teacher()
    with pytest.raises(TeacherError, match="the same model object twice"):
        run(tmp_path, [guide, guide])


def test_flags(tmp_path: Path) -> None:
    assert CompressionArguments(teacher_model_name_or_path=["a", "b"]).teacher_model_name_or_path == "a,b"  # type: ignore[arg-type]
    assert places(",b", 2, flag="x") == (None, "b") and places("a,b", 1, flag="x") == ("a,b",)
    assert shares("3,1", 2) == (0.75, 0.25) and shares(None, 4) == (0.25,) * 4
    with_comma = tmp_path / "one,folder"
    with_comma.mkdir()
    assert count_of_teachers(str(with_comma), None, None) == 1 and count_of_teachers("a,b", None, None) == 2
    for flags, match in (
        ({"teacher_model_name_or_path": "a,b", "teacher_weights": "1"}, "has 1 numbers, and there are 2"),
        ({"teacher_model_name_or_path": "a,b", "teacher_weights": "x,y"}, "one number for each teacher"),
        ({"teacher_model_name_or_path": "a,b", "teacher_revision": "main"}, "teacher_revision main: of which of 2"),
        ({"teacher_model_name_or_path": "a,b", "teacher_cache_dir": "c,c"}, "names c twice"),
        ({"teacher_model_name_or_path": "a,/no/such/folder"}, "/no/such/folder: there is no such folder"),
    ):
        with pytest.raises(ArgumentError, match=match):
            CompressionArguments(**flags)
