"""A paper's method as a list of losses. Weights given by flag replace the recipe's; 0 leaves a loss out."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace

from hf_compress.errors import ArgumentError
from hf_compress.layers.layer_map import LayerMap
from hf_compress.losses.attention_scores import AttentionScoresLoss
from hf_compress.losses.hidden_states import EmbeddingsLoss, HiddenStatesLoss
from hf_compress.losses.labels import LabelsLoss
from hf_compress.losses.logits import LogitsLoss
from hf_compress.losses.loss import Loss


def layerwise(layer_map: LayerMap | str | None = None) -> list[Loss]:
    """The default: softened predictions (T = 2), 10 x hidden states, attention scores where both have as many heads; no labels.

    Not of a paper: TinyBERT's losses in one phase, with the hidden states weighted up. `tinybert` scores the same within the seeds' spread
    (benchmarks/results/glue.md); this one does without equal numbers of heads.
    """
    return [LogitsLoss(temperature=2.0), HiddenStatesLoss(layer_map, weight=10.0), AttentionScoresLoss(layer_map, required=False)]


def logits(layer_map: LayerMap | str | None = None) -> list[Loss]:
    """Softened predictions (T = 2) and hard labels: Hinton et al. 1503.02531. No layer is compared, so any student will do."""
    return [LogitsLoss(temperature=2.0), LabelsLoss(weight=0.5)]


def distilbert(layer_map: LayerMap | str | None = None) -> list[Loss]:
    """DistilBERT 1910.01108: 5 x logits (T = 2), 2 x the task's own loss, 1 x the cosine of the last layers."""
    return [LogitsLoss(temperature=2.0, weight=5.0), LabelsLoss(weight=2.0), HiddenStatesLoss(layer_map, kind="cosine", pairs="last")]


def tinybert(layer_map: LayerMap | str | None = None) -> list[Loss]:
    """TinyBERT 1909.10351: embeddings, hidden states and attention scores over a uniform map; soft cross-entropy at T = 1; no labels.

    The paper trains the layers first and the predictions after: `--distill_phases intermediate=20,prediction=3`.
    """
    return [
        EmbeddingsLoss(),
        HiddenStatesLoss(layer_map),
        AttentionScoresLoss(layer_map),
        LogitsLoss(temperature=1.0, kind="soft_cross_entropy"),
    ]


def pkd(layer_map: LayerMap | str | None = None) -> list[Loss]:
    """Patient knowledge distillation 1908.09355: (1 - a) labels + a logits + b normalised summary tokens; a = 0.5, T = 5, b = 100.

    The student's last layer is left to the predictions, as in the paper.
    """
    return [
        LabelsLoss(weight=0.5),
        LogitsLoss(temperature=5.0, weight=0.5),
        HiddenStatesLoss(layer_map, kind="summary", weight=100.0, pairs="all_but_last"),
    ]


def mud(layer_map: LayerMap | str | None = None) -> list[Loss]:
    """Minimum-knowledge distillation 2106.05691: hidden states, of which a small part is enough, and soft cross-entropy at T = 1.

    How much of the hidden states is `--hidden_states_selection`. The paper trains in two phases:
    `--distill_phases intermediate=20,prediction=5`; neither attention nor labels are compared.
    """
    return [HiddenStatesLoss(layer_map), LogitsLoss(temperature=1.0, kind="soft_cross_entropy")]


RECIPES: dict[str, Callable[[LayerMap | str | None], list[Loss]]] = {
    "distilbert": distilbert,
    "layerwise": layerwise,
    "logits": logits,
    "mud": mud,
    "pkd": pkd,
    "tinybert": tinybert,
}
DEFAULT_RECIPE = "layerwise"


def losses_of(
    recipe: str = DEFAULT_RECIPE,
    *,
    layer_map: LayerMap | str | None = None,
    temperature: float | None = None,
    weights: Mapping[str, float] | None = None,
    skip_heads: float | None = None,
) -> list[Loss]:
    """A recipe with the user's own settings put into it.

    Args:
        recipe: a name of `RECIPES`.
        layer_map: a map or its name; None is what dropping left, else a uniform map.
        temperature: replaces the recipe's.
        weights: by loss name; a loss that the recipe lacks is added with that weight, one of weight 0 is left out.
        skip_heads: see `AttentionScoresLoss`.

    Raises:
        ArgumentError: where nothing is left to learn from, or a setting would have no effect.
    """
    losses = {loss.name: loss for loss in RECIPES[recipe](layer_map)}
    others: list[Loss] = [LabelsLoss(), LogitsLoss(), HiddenStatesLoss(layer_map), EmbeddingsLoss(), AttentionScoresLoss(layer_map)]
    available = {loss.name: loss for loss in others} | losses
    for name, weight in (weights or {}).items():
        if name not in available:
            raise ArgumentError(f"There is no loss {name!r}; there are {', '.join(available)}.")
        losses[name] = replace(available[name], weight=weight)
        asked = losses[name]
        if isinstance(asked, AttentionScoresLoss):
            losses[name] = replace(asked, required=True)
    for name, loss in losses.items():
        if temperature is not None and isinstance(loss, LogitsLoss):
            losses[name] = replace(loss, temperature=temperature)
        if skip_heads is not None and isinstance(loss, AttentionScoresLoss):
            losses[name] = replace(loss, skip_heads=skip_heads)
    chosen = [loss for loss in losses.values() if loss.weight != 0]
    if not chosen:
        raise ArgumentError(f"Every loss of the recipe {recipe} has weight 0, so there is nothing to learn from: give one more.")
    for flag, value, kinds in (
        ("distill_layer_map", layer_map, (HiddenStatesLoss, AttentionScoresLoss)),
        ("distill_temperature", temperature, (LogitsLoss,)),
        ("distill_skip_heads", skip_heads, (AttentionScoresLoss,)),
    ):
        users = [loss for loss in chosen if isinstance(loss, kinds) and type(loss) is not EmbeddingsLoss]
        if value is not None and not users:
            raise ArgumentError(
                f"--{flag} would have no effect: the losses are {', '.join(loss.name for loss in chosen)}, and none of them uses it. "
                "Leave it out, or add a loss with --distill_weights."
            )
    return chosen
