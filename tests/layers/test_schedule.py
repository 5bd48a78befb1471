from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, BertForSequenceClassification

from hf_compress.errors import LayerDropError
from hf_compress.layers.contribution import measure_contribution
from hf_compress.layers.drop import drop_layers
from hf_compress.layers.record import KeptLayers, record_drop, recorded_drop, recorded_layers
from hf_compress.layers.request import DropRequest
from hf_compress.layers.schedule import drop_next, due, last_epoch, plan_schedule, stages
from hf_compress.layers.strategies import layers_to_drop
from hf_compress.task import ModelShape
from tests.tiny_models import tiny_batch, tiny_model

ORDERS = {
    "top": (6, 5, 4),
    "bottom": (1, 2, 3),
    "symmetric": (4, 3, 5),
    "alternate": (6, 4, 2),
    "alternate_odd": (5, 3, 1),
}


def planned(strategy: str | None, **request: Any) -> dict[str, KeptLayers]:
    return plan_schedule(tiny_model("bert", num_layers=6), DropRequest.of(strategy, **request))


@pytest.mark.parametrize("strategy", ORDERS)
def test_after_k_drops_the_model_is_what_the_strategy_leaves_for_k(strategy: Any) -> None:
    record = planned(strategy, num_layers_to_drop=3, every_n_epochs=2)
    assert record["layers"].to_drop == ORDERS[strategy]
    for number, stage in enumerate(stages(record)):
        dropped = layers_to_drop(strategy, 6, number) if number else ()
        assert stage["layers"].dropped == dropped
    assert number == 3
    assert last_epoch(record) == 6


def test_when_layers_go() -> None:
    record = planned("top", num_layers_to_drop=2, every_n_epochs=2)
    assert [due(record, epoch) for epoch in (0, 1)] == [{}, {}]
    assert due(record, 2) == due(record, 3) == {"layers": (6,)}
    assert due(record, 9) == {"layers": (6, 5)}
    later = list(stages(record))[1]
    assert [due(later, epoch) for epoch in (2, 3, 4)] == [{}, {}, {"layers": (5,)}]
    at_once = planned(None, layers_to_drop=[2, 5], after_epochs=3)
    assert at_once["layers"].to_drop == (5, 2)
    assert [due(at_once, epoch) for epoch in (2, 3)] == [{}, {"layers": (5, 2)}]
    assert (len(list(stages(at_once))), last_epoch(at_once)) == (2, 3)


@pytest.mark.parametrize("architecture", ["bert", "albert", "t5"])
def test_each_stage_computes_what_a_model_without_these_layers_computes(architecture: str, tmp_path: Path) -> None:
    model = tiny_model(architecture, num_layers=4).eval()
    batch = tiny_batch(model)
    request = DropRequest.of("top", num_layers_to_drop=2, every_n_epochs=1)
    record = plan_schedule(model, request)
    record_drop(model.config, record)
    assert recorded_drop(model.config) is None
    for epoch in (1, 2):
        drop_next(model, due(recorded_layers(model.config) or {}, epoch), request)
        reference = tiny_model(architecture, num_layers=4).eval()
        drop_layers(reference, strategy="top", num_layers_to_drop=epoch)
        with torch.no_grad():
            torch.testing.assert_close(model(**batch)[0], reference(**batch)[0], rtol=0, atol=0)
        now, then = recorded_drop(model.config), recorded_drop(reference.config)
        assert now is not None and then is not None
        assert {name: each.kept for name, each in now.items()} == {name: each.kept for name, each in then.items()}
        model.save_pretrained(tmp_path / str(epoch))
        with torch.no_grad():
            loaded = type(model).from_pretrained(tmp_path / str(epoch)).eval()
            torch.testing.assert_close(loaded(**batch)[0], model(**batch)[0], rtol=0, atol=0)
    written = recorded_layers(AutoConfig.from_pretrained(tmp_path / "1"))
    assert written is not None
    assert all(each.to_drop == (3,) and ("every_n_epochs", 1) in each.request for each in written.values())
    assert all(not each.to_drop for each in recorded_layers(model.config).values())  # type: ignore[union-attr]


def test_contribution_is_measured_once_and_the_least_goes_first() -> None:
    model = tiny_model("bert", num_layers=6)
    batches = [tiny_batch(model)]
    (alike,) = measure_contribution(model, batches).values()
    request = DropRequest.of("contribution", num_layers_to_drop=3, every_n_epochs=1)
    record = plan_schedule(model, request, batches)
    assert record["layers"].to_drop == tuple(sorted(range(1, 7), key=lambda layer: -alike[layer - 1])[:3])
    record_drop(model.config, record)
    drop_next(model, {"layers": record["layers"].to_drop[:1]}, request)
    # In its middle it is not what the strategy leaves in the end, and a run of the same schedule needs no examples.
    with pytest.raises(LayerDropError, match="another drop"):
        drop_layers(model, strategy="contribution", num_layers_to_drop=3, batches=batches)
    assert plan_schedule(model, request) == recorded_layers(model.config)
    with pytest.raises(LayerDropError, match=r"in the middle of another schedule.*every_n_epochs=1.*every_n_epochs=2"):
        plan_schedule(model, DropRequest.of("contribution", num_layers_to_drop=3, every_n_epochs=2), batches)


def test_before_the_first_drop_nothing_is_dropped_and_each_layer_learns_from_its_own() -> None:
    model = tiny_model("bert", num_layers=4)
    record_drop(model.config, plan_schedule(model, DropRequest.of("top", after_epochs=1)))
    stack = ModelShape.of(model).stacks["layers"]
    assert stack.map_from("kept", ModelShape.of(tiny_model("bert", num_layers=4)).stacks["layers"]).pairs == (
        (1, 1),
        (2, 2),
        (3, 3),
        (4, 4),
    )
    drop_layers(model, strategy="bottom", num_layers_to_drop=1)  # another run may do with it what it likes
    assert recorded_layers(model.config) == {"layers": KeptLayers((2, 3, 4), 4, (("num_layers_to_drop", 1), ("strategy", "bottom")))}


def test_every_stage_must_load_again() -> None:
    model = tiny_model("t5", num_layers=4)  # layer 1 alone holds the position bias: its drop is found before anything is changed
    with pytest.raises(LayerDropError, match="Layer 1 has to stay"):
        plan_schedule(model, DropRequest.of("bottom", num_layers_to_drop=1, every_n_epochs=1))


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        ({"after_epochs": 0}, "after_epochs is 0.*at least 1"),
        ({"every_n_epochs": 1.5}, "every_n_epochs is 1.5"),
        ({"after_epochs": 1, "every_n_epochs": 1}, "leave one"),
        ({"freeze_before_drop": True}, "they go before training"),
    ],
)
def test_refused(request_: dict[str, Any], message: str) -> None:
    with pytest.raises(LayerDropError, match=message):
        DropRequest.of("top", **request_)


def test_a_saved_stage_is_a_plain_model(tmp_path: Path) -> None:
    model = tiny_model("bert", num_layers=4)
    request = DropRequest.of("symmetric", num_layers_to_drop=2, every_n_epochs=1)
    record_drop(model.config, plan_schedule(model, request))
    weight = model.bert.encoder.layer[3].output.dense.weight.clone()
    drop_next(model, {"layers": (3,)}, request)
    assert torch.equal(model.bert.encoder.layer[2].output.dense.weight, weight)
    model.save_pretrained(tmp_path)
    assert len(BertForSequenceClassification.from_pretrained(tmp_path).bert.encoder.layer) == 3
