"""One process of 16, two of 8, two of 4 that accumulate: the same gradient and the same weights, with the teacher live and on disk.

One launch of two processes does all its runs one after the other; those of one process are in the tests themselves.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from tests.cached_runs import Plain, whats_in
from tests.equal_runs import agree, gradient_and_weights, uneven
from tests.launching import launch
from tests.tiny_runs import largest_difference, student, teacher

SCRIPT = """
import os, sys
from pathlib import Path
import torch
from safetensors.torch import save_file
from tests.cached_runs import cached, data
from tests.cache.tiny_caches import pairs
from tests.equal_runs import gradient_and_weights, uneven
from tests.tiny_runs import student, teacher, weights
from datasets import Dataset

folder, rank = Path(sys.argv[1]), int(os.environ["RANK"])
torch.set_num_threads(1)


def run(name, guide, **more):
    found = gradient_and_weights(folder / f"run {name}", guide, **more)
    save_file(found, folder / f"{name}-{rank}.safetensors")


run("2 x 8", teacher(), batch_size=8)
run("2 x 4 x 2", teacher(), batch_size=4, accumulation=2)
run("checkpointing", teacher(), batch_size=8, gradient_checkpointing=True)
run("built by two", teacher(), batch_size=8, cache=folder / "by two")
# Built by one process; here with another order, and part of the data.
run("built by one", None, batch_size=8, cache=folder / "by one", data=uneven().select(range(32)), seed=11)

# 21 examples are no multiple of anything: the last step of an epoch has fewer micro-batches, and examples that come again.
rows = [{**row, "attention_mask": [1] * len(row["input_ids"]), "label": number % 2} for number, row in enumerate(pairs(21, seed=3))]
trainer = cached(
    folder / "remainders", student(), teacher(), dataset=Dataset.from_list(rows),
    per_device_train_batch_size=4, gradient_accumulation_steps=2, max_steps=-1, num_train_epochs=3,
)
torch.save((trainer.steps, trainer.values, weights(trainer)), folder / f"remainders-{rank}.pt")
"""

Found = Callable[[str], dict[str, Tensor]]


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("two")
    # A cache of one process, for two to read; one step, since the training does not count.
    gradient_and_weights(folder / "run by one", teacher(), batch_size=16, cache=folder / "by one", max_steps=1)
    launch(folder, SCRIPT)
    return folder


@pytest.fixture(scope="module")
def one(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Tensor]:
    return gradient_and_weights(tmp_path_factory.mktemp("one"), teacher(), batch_size=16)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["2 x 8", "2 x 4 x 2", "checkpointing", "built by two"])
def test_two_processes_learn_what_one_does(two: Path, one: dict[str, Tensor], name: str) -> None:
    for rank in range(2):
        agree(one, load_file(two / f"{name}-{rank}.safetensors"))


@pytest.mark.slow
def test_a_cache_of_one_process_serves_two_and_the_other_way_round(two: Path, tmp_path: Path) -> None:
    part = {"batch_size": 16, "data": uneven().select(range(32)), "seed": 11}
    live = gradient_and_weights(tmp_path / "live", teacher(), **part)
    agree(live, gradient_and_weights(tmp_path / "read", None, cache=two / "by two", **part))
    agree(live, load_file(two / "built by one-1.safetensors"))


@pytest.mark.slow
def test_unequal_remainders_end_and_count_what_was_there(two: Path) -> None:
    (steps, values, ends), (more_steps, more_values, more_ends) = (torch.load(two / f"remainders-{rank}.pt") for rank in range(2))
    merged = {step: batches + more_steps[step] for step, batches in steps.items()}
    sizes = [sum(len(batch["input_ids"]) for batch in batches) for batches in merged.values()]
    assert sizes == [16, 8] * 3  # 24 examples an epoch: three come twice
    assert len({example for step in (0, 1) for example in whats_in(merged[step])}) == 21
    plain = Plain(student(), teacher())
    losses = plain.follow(merged)
    assert [values[step] + more_values[step] for step in sorted(values)] == pytest.approx(losses, abs=1e-6, rel=1e-6)
    for weights in (ends, more_ends):
        assert largest_difference(weights, plain.weights()) < 1e-5
