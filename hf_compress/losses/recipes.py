"""A paper's method as a list of losses. Weights given by flag replace the recipe's; 0 leaves a loss out.

The flags list these names before torch is loaded, so the losses are taken from the package's public names, which are imported when a
recipe is made. A new recipe is a function here, its name in `RecipeName` and `RECIPES`; a loss that flags give a weight to stands in
`LossName` and `LOSSES`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import fields, replace
from typing import TYPE_CHECKING, Any, Literal

import hf_compress as hf
from hf_compress.errors import ArgumentError

if TYPE_CHECKING:
    from hf_compress.layers.layer_map import LayerMap
    from hf_compress.losses.loss import Loss

RecipeName = Literal[
    "layerwise",
    "logits",
    "distilbert",
    "tinybert",
    "tinybert_general",
    "pkd",
    "mud",
    "minilm",
    "minilmv2",
    "fitnets",
    "ckd",
    "alp",
    "emd",
    "mobilebert",
]
LossName = Literal[
    "labels",
    "logits",
    "hidden_states",
    "embeddings",
    "attention_scores",
    "attentions",
    "query_relations",
    "key_relations",
    "value_relations",
    "hint",
    "combined_layers",
    "mixed_layers",
    "hidden_states_transport",
    "attention_scores_transport",
]


def layerwise(layer_map: LayerMap | str | None = None) -> list[Loss]:
    """The default: softened predictions (T = 2), 10 x hidden states, attention scores where both have as many heads; no labels.

    Not of a paper: TinyBERT's losses in one phase, with the hidden states weighted up. `tinybert` scores the same within the seeds' spread
    (benchmarks/results/glue.md); this one does without equal numbers of heads.
    """
    return [hf.LogitsLoss(temperature=2.0), hf.HiddenStatesLoss(layer_map, weight=10.0), hf.AttentionScoresLoss(layer_map, required=False)]


def logits(layer_map: LayerMap | str | None = None) -> list[Loss]:
    """Softened predictions (T = 2) and hard labels: Hinton et al. 1503.02531. No layer is compared, so any student will do."""
    return [hf.LogitsLoss(temperature=2.0), hf.LabelsLoss(weight=0.5)]


def distilbert(layer_map: LayerMap | str | None = None) -> list[Loss]:
    """DistilBERT 1910.01108: 5 x logits (T = 2), 2 x the task's own loss, 1 x the cosine of the last layers."""
    return [
        hf.LogitsLoss(temperature=2.0, weight=5.0),
        hf.LabelsLoss(weight=2.0),
        hf.HiddenStatesLoss(layer_map, kind="cosine", pairs="last"),
    ]


def tinybert(layer_map: LayerMap | str | None = None) -> list[Loss]:
    """TinyBERT 1909.10351: embeddings, hidden states and attention scores over a uniform map; soft cross-entropy at T = 1; no labels.

    The paper trains the layers first and the predictions after: `--distill_phases intermediate=20,prediction=3`.
    """
    return [
        hf.EmbeddingsLoss(),
        hf.HiddenStatesLoss(layer_map),
        hf.AttentionScoresLoss(layer_map),
        hf.LogitsLoss(temperature=1.0, kind="soft_cross_entropy"),
    ]


def tinybert_general(layer_map: LayerMap | str | None = None) -> list[Loss]:
    """TinyBERT's general distillation (1909.10351, section 4.2): embeddings, hidden states and attention scores, on raw text.

    The teacher is a language model that was pre-trained and not fine-tuned. Nothing of predictions or labels is computed, so
    `--mlm_probability 0` is right, and a teacher without a head will do. The student is then taught its task by `tinybert`.
    """
    return [hf.EmbeddingsLoss(), hf.HiddenStatesLoss(layer_map), hf.AttentionScoresLoss(layer_map)]


def pkd(layer_map: LayerMap | str | None = None) -> list[Loss]:
    """Patient knowledge distillation 1908.09355: (1 - a) labels + a logits + b normalised summary tokens; a = 0.5, T = 5, b = 100.

    The student's last layer is left to the predictions, as in the paper.
    """
    return [
        hf.LabelsLoss(weight=0.5),
        hf.LogitsLoss(temperature=5.0, weight=0.5),
        hf.HiddenStatesLoss(layer_map, kind="summary", weight=100.0, pairs="all_but_last"),
    ]


def mud(layer_map: LayerMap | str | None = None) -> list[Loss]:
    """Minimum-knowledge distillation 2106.05691: hidden states, of which a small part is enough, and soft cross-entropy at T = 1.

    How much of the hidden states is `--hidden_states_selection`. The paper trains in two phases:
    `--distill_phases intermediate=20,prediction=5`; neither attention nor labels are compared.
    """
    return [hf.HiddenStatesLoss(layer_map), hf.LogitsLoss(temperature=1.0, kind="soft_cross_entropy")]


def minilm(layer_map: LayerMap | str | None = None) -> list[Loss]:
    """MiniLM 2002.10957: where the last layer's attention goes, and how its values are related; then soft cross-entropy at T = 1.

    The models need equally many heads; their widths may differ. The paper distils a language model on raw text, without predictions, and
    fine-tunes the student after: leave them out for that with `--distill_weights logits=0`.
    """
    return [
        hf.AttentionsLoss(layer_map, pairs="last"),
        hf.ValueRelationsLoss(layer_map, relation_heads="own"),
        hf.LogitsLoss(temperature=1.0, kind="soft_cross_entropy"),
    ]


def minilmv2(layer_map: LayerMap | str | None = None) -> list[Loss]:
    """MiniLMv2 2012.15828: relations of queries, of keys and of values in one layer, 1/3 each; then soft cross-entropy at T = 1.

    Neither heads nor widths need be equal. The last layers are compared unless a map names others: the paper takes layer 21 of BERT-large
    (`--distill_layer_map 6:21`). On raw text, as in the paper, without predictions: `--distill_weights logits=0`.
    """
    return [
        hf.QueryRelationsLoss(layer_map, weight=1 / 3),
        hf.KeyRelationsLoss(layer_map, weight=1 / 3),
        hf.ValueRelationsLoss(layer_map, weight=1 / 3),
        hf.LogitsLoss(temperature=1.0, kind="soft_cross_entropy"),
    ]


def fitnets(layer_map: LayerMap | str | None = None) -> list[Loss]:
    """FitNets 1412.6550: the middle layer, through a regressor; then logits (T = 3) and the labels.

    The paper trains up to the hint first: `--distill_phases intermediate=5,prediction=3`. Then the logits' weight falls in a straight line,
    from 4 to 1, without T^2.
    """
    logits = hf.LogitsLoss(temperature=3.0, kind="soft_cross_entropy", weight=4.0, final_weight=1.0)
    return [hf.HintLoss(layer_map), logits, hf.LabelsLoss()]


def ckd(layer_map: LayerMap | str | None = None) -> list[Loss]:
    """CKD, "Why Skip If You Can Combine" 2010.03034: 0.7 x groups of teacher layers, none skipped; 0.2 x logits, 0.1 x labels.

    The weights are of the released code's example; the temperature, 2, is this package's. Other groups than even ones are had in
    Python: `CombinedLayersLoss("overlap")`. A layer map does not go with it.
    """
    return [hf.CombinedLayersLoss(weight=0.7), hf.LogitsLoss(temperature=2.0, weight=0.2), hf.LabelsLoss(weight=0.1)]


def alp(layer_map: LayerMap | str | None = None) -> list[Loss]:
    """ALP-KD 2012.14022: each layer's summary token against the mix of teacher layers that it attends to; logits (T = 2), labels.

    All three weigh 1, which is this package's choice: the paper's weights were not at hand. Buckets are had in Python:
    `MixedLayersLoss("overlap")` is ALP-PO. A layer map does not go with it.
    """
    return [hf.MixedLayersLoss(), hf.LogitsLoss(temperature=2.0), hf.LabelsLoss()]


def emd(layer_map: LayerMap | str | None = None) -> list[Loss]:
    """BERT-EMD 2010.06133: all layers against all, hidden states and attention scores; the embeddings; soft cross-entropy at T = 1.

    The intermediate losses weigh 1, as in `tinybert`; the released code has 0.001 to 0.005 of sums that are larger. A layer map does not go
    with it.
    """
    return [
        hf.EmbeddingsLoss(),
        hf.HiddenStatesTransportLoss(),
        hf.AttentionScoresTransportLoss(),
        hf.LogitsLoss(temperature=1.0, kind="soft_cross_entropy"),
    ]


def mobilebert(layer_map: LayerMap | str | None = None) -> list[Loss]:
    """MobileBERT 2004.02984: feature maps and where attention goes, of every mapped layer; then logits (T = 1) and labels, half each.

    Heads must be equal in number. The paper trains the layers first, one after another from the bottom, and the predictions after:
    `--distill_phases intermediate=20,prediction=3 --distill_progressive`.
    """
    return [
        hf.HiddenStatesLoss(layer_map),
        hf.AttentionsLoss(layer_map),
        hf.LogitsLoss(temperature=1.0, weight=0.5),
        hf.LabelsLoss(weight=0.5),
    ]


RECIPES: dict[RecipeName, Callable[[LayerMap | str | None], list[Loss]]] = {
    "alp": alp,
    "ckd": ckd,
    "distilbert": distilbert,
    "emd": emd,
    "fitnets": fitnets,
    "layerwise": layerwise,
    "logits": logits,
    "minilm": minilm,
    "minilmv2": minilmv2,
    "mobilebert": mobilebert,
    "mud": mud,
    "pkd": pkd,
    "tinybert": tinybert,
    "tinybert_general": tinybert_general,
}
DEFAULT_RECIPE: RecipeName = "layerwise"

# Each loss that a flag may add to a recipe, with its own defaults.
LOSSES: dict[LossName, Callable[[LayerMap | str | None], Loss]] = {
    "labels": lambda layer_map: hf.LabelsLoss(),
    "logits": lambda layer_map: hf.LogitsLoss(),
    "hidden_states": lambda layer_map: hf.HiddenStatesLoss(layer_map),
    "embeddings": lambda layer_map: hf.EmbeddingsLoss(),
    "attention_scores": lambda layer_map: hf.AttentionScoresLoss(layer_map),
    "attentions": lambda layer_map: hf.AttentionsLoss(layer_map),
    "query_relations": lambda layer_map: hf.QueryRelationsLoss(layer_map),
    "key_relations": lambda layer_map: hf.KeyRelationsLoss(layer_map),
    "value_relations": lambda layer_map: hf.ValueRelationsLoss(layer_map),
    "hint": lambda layer_map: hf.HintLoss(layer_map),
    "combined_layers": lambda layer_map: hf.CombinedLayersLoss(),
    "mixed_layers": lambda layer_map: hf.MixedLayersLoss(),
    "hidden_states_transport": lambda layer_map: hf.HiddenStatesTransportLoss(),
    "attention_scores_transport": lambda layer_map: hf.AttentionScoresTransportLoss(),
}


def losses_of(
    recipe: RecipeName = DEFAULT_RECIPE,
    *,
    layer_map: LayerMap | str | None = None,
    temperature: float | None = None,
    weights: Mapping[LossName, float] | None = None,
    final_weights: Mapping[LossName, float] | None = None,
    skip_heads: float | None = None,
    relation_heads: int | None = None,
) -> list[Loss]:
    """A recipe with the user's own settings put into it.

    Args:
        recipe: a name of `RECIPES`.
        layer_map: a map or its name; None is what dropping left, else a uniform map.
        temperature: replaces the recipe's.
        weights: by loss name; a loss that the recipe lacks is added with that weight, one of weight 0 is left out.
        final_weights: by loss name; the weight becomes this in the course of the training.
        skip_heads: see `AttentionScoresLoss`.
        relation_heads: see `RelationsLoss`.

    Raises:
        ArgumentError: where nothing is left to learn from, or a setting would have no effect.
    """
    losses = {loss.name: loss for loss in RECIPES[recipe](layer_map)}
    for name, weight in (weights or {}).items():
        if name not in LOSSES:
            raise ArgumentError(f"There is no loss {name!r}; there are {', '.join(LOSSES)}.")
        asked = losses[name] if name in losses else LOSSES[name](layer_map)
        losses[name] = replace(asked, weight=weight, final_weight=None, **({"required": True} if _takes(asked, "required") else {}))
    chosen = [loss for loss in losses.values() if loss.weight != 0]
    if not chosen:
        raise ArgumentError(f"Every loss of the recipe {recipe} has weight 0, so there is nothing to learn from: give one more.")
    for name, final in (final_weights or {}).items():
        if not any(loss.name == name for loss in chosen):
            there = ", ".join(loss.name for loss in chosen)
            raise ArgumentError(f"--distill_final_weights {name}, but the losses are {there}. Add it with --distill_weights.")
        chosen = [replace(loss, final_weight=final) if loss.name == name else loss for loss in chosen]
    settings: dict[str, Any] = {
        "layer_map": layer_map,
        "temperature": temperature,
        "skip_heads": skip_heads,
        "relation_heads": relation_heads,
    }
    for setting, value in settings.items():
        if value is None:
            continue
        if not any(_takes(loss, setting) for loss in chosen):
            raise ArgumentError(
                f"--distill_{setting} would have no effect: the losses are {', '.join(loss.name for loss in chosen)}, and none of them "
                "uses it. Leave it out, or add a loss with --distill_weights."
            )
        chosen = [replace(loss, **{setting: value}) if _takes(loss, setting) else loss for loss in chosen]
    return chosen


def _takes(loss: Loss, setting: str) -> bool:
    """Whether a loss has a setting; the embeddings' only pair of layers is fixed."""
    return any(each.name == setting for each in fields(loss)) and not (setting == "layer_map" and isinstance(loss, hf.EmbeddingsLoss))
