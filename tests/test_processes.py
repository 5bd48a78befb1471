"""Two processes that agree, and two that do not: refused on both, in the same words, before the first step, and nobody hangs.

One launch does everything one after the other; that the last run in it is right shows that the processes stayed in step.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.equal_runs import gradient_and_weights, uneven
from tests.launching import launch
from tests.tiny_runs import largest_difference, teacher

SCRIPT = """
import json, os, sys
from pathlib import Path
import torch
from safetensors.torch import save_file
from transformers import TrainerCallback
from hf_compress import CompressionArguments, DistillTrainer, LogitsLoss
from hf_compress.cache import draft
from hf_compress.errors import CompressionError
from tests.cached_runs import tokenizer
from tests.equal_runs import gradient_and_weights, uneven
from tests.tiny_models import tiny_model
from tests.tiny_runs import NARROW, arguments, every_loss, student, teacher

folder, rank = Path(sys.argv[1]), int(os.environ["RANK"])
torch.set_num_threads(1)
draft.SEEN_WITHIN = 1.0
facts = {}


def save(name, tensors):
    save_file({key: value.contiguous() for key, value in tensors.items()}, folder / f"{name}-{rank}.safetensors")


# --- what is done once, and what is equal ---


class Watching(TrainerCallback):
    def on_init_end(self, args, state, control, **kwargs):
        torch.rand(rank + 1)  # from here on the processes draw other numbers

    def on_step_begin(self, args, state, control, model=None, **kwargs):
        if state.global_step == 0:
            save("projections at step 1", dict(model.hf_compress_projections.state_dict()))


model = tiny_model("bert", num_layers=4, seed=2, **NARROW)
forwards = []
counting = model.register_forward_hook(lambda *_: forwards.append(1))
trainer = DistillTrainer(
    model, arguments(folder / "once", per_device_train_batch_size=8), teacher=teacher(), losses=every_loss(), train_dataset=uneven(),
    compression=CompressionArguments(layer_drop_strategy="contribution", num_layers_to_drop=2), callbacks=[Watching()],
    processing_class=tokenizer(),
)
counting.remove()
facts |= {"forwards": len(forwards), "kept": trainer.state.stateful_callbacks["LayerDropCallback"]["attributes"]["kept"]}
save("projections before", dict(model.hf_compress_projections.state_dict()))
trainer.train()

adam = {"optim": "adamw_torch", "adam_epsilon": 1e-4, "max_steps": 6, "save_strategy": "steps", "save_steps": 3, "batch_size": 8}
save("unbroken", gradient_and_weights(folder / "unbroken", teacher(), **adam))
save("resumed", gradient_and_weights(folder / "resumed", teacher(), resume=folder / "unbroken" / "checkpoint-3", **adam))

# --- what is refused ---


def refuse(name, **more):
    given = {"teacher": teacher(), "losses": [LogitsLoss()], "train_dataset": uneven(), **more}
    flags = CompressionArguments(**given.pop("flags", {}))
    try:
        args = arguments(folder / name, per_device_train_batch_size=8)
        DistillTrainer(student(), args, compression=flags, processing_class=tokenizer(), **given).train()
    except CompressionError as error:
        facts[name] = [type(error).__name__, str(error)]


mine = lambda name: {"teacher_cache_dir": str(folder / (name if rank else "cache"))}
refuse("no cache", teacher=None, flags=mine("nothing here"))
refuse("another cache", teacher=None, flags=mine("other cache"))
refuse("no shared disk", flags={"teacher_cache_dir": str(folder / f"built by {rank}")})
refuse("fewer examples", train_dataset=uneven().select(range(48 - rank)))
refuse("other examples", train_dataset=uneven().select(range(48)) if rank else uneven().select(reversed(range(48))))
refuse("other losses", losses=[LogitsLoss(temperature=2.0 + rank)])
refuse("another teacher", teacher=tiny_model("bert", num_layers=4, seed=1 + rank))
refuse("no teacher", teacher=None, flags={"teacher_model_name_or_path": str(folder / ("nobody" if rank else "teacher"))}, losses=None)
(folder / f"facts-{rank}.json").write_text(json.dumps(facts))

save("last", gradient_and_weights(folder / "last", None, batch_size=8, cache=folder / "cache"))
"""


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("two")
    gradient_and_weights(folder / "run", teacher(), batch_size=16, cache=folder / "cache", max_steps=1)
    gradient_and_weights(folder / "run", teacher(), batch_size=16, cache=folder / "other cache", max_steps=1, data=uneven(32))
    teacher().save_pretrained(folder / "teacher")
    (folder / "nobody").mkdir()
    launch(folder, SCRIPT)
    return folder


def facts(folder: Path) -> tuple[dict[str, object], dict[str, object]]:
    first, second = (json.loads((folder / f"facts-{rank}.json").read_text()) for rank in range(2))
    return first, second


def both(folder: Path, name: str) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    first, second = (load_file(folder / f"{name}-{rank}.safetensors") for rank in range(2))
    return first, second


@pytest.mark.slow
def test_contribution_is_measured_once_and_projections_are_equal_from_the_first_step(two: Path) -> None:
    first, second = facts(two)
    assert first["forwards"] and not second["forwards"]
    assert first["kept"] == second["kept"]
    assert largest_difference(*both(two, "projections before")) > 1e-3
    assert largest_difference(*both(two, "projections at step 1")) == 0


@pytest.mark.slow
def test_a_resumed_run_ends_where_an_unbroken_one_does(two: Path) -> None:
    for unbroken, resumed in zip(both(two, "unbroken"), both(two, "resumed"), strict=True):
        own = {name: value for name, value in unbroken.items() if not name.startswith("gradient.")}
        assert largest_difference(own, resumed) < 1e-7
        assert any("projections" in name for name in own)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "kind", "words"),
    [
        ("no cache", "CacheError", ("different teachers on disk", "process 0 sees one of", "process 1 sees none", "a disk that all")),
        ("another cache", "CacheError", ("different teachers on disk", "with 46 examples", "process 1 sees one of", "--teacher_cache_dir")),
        ("no shared disk", "CacheError", ("do not share the folder", "building.json", "--teacher_cache_dir")),
        (
            "fewer examples",
            "DataError",
            ("different training data", "process 0 has 48 examples", "process 1 has 47", "--max_train_samples"),
        ),
        ("other examples", "DataError", ("different training data", "48 examples (content")),
        ("other losses", "ArgumentError", ("different losses", "T = 2", "T = 3", "the same flags")),
        ("another teacher", "TeacherError", ("different teachers", "Load the same model")),
        ("no teacher", "TeacherError", ("nobody", "cannot be loaded")),
    ],
)
def test_refused_on_both_in_the_same_words(two: Path, name: str, kind: str, words: tuple[str, ...]) -> None:
    first, second = facts(two)
    assert first[name] == second[name]
    found, message = first[name]  # type: ignore[misc]
    assert found == kind
    for word in words:
        assert word in message


@pytest.mark.slow
def test_after_all_that_the_two_are_in_step(two: Path, tmp_path: Path) -> None:
    live = gradient_and_weights(tmp_path, teacher(), batch_size=16)
    for found in both(two, "last"):
        assert largest_difference(live, found) < 1e-5
