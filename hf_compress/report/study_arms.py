"""Which trainings a study compares: each is an arm, one way to choose from the teacher's hidden states. No torch here.

    ends     none: no hidden states at all; all: the run's own layers, whole
    depth    1l, 2l, ... of each way to pair layers           all tokens, all dimensions
    length   5t, 10t, ... of each way to choose tokens        all layers, all dimensions
    width    0.05h, 0.1h, ... of each way to choose them      all layers, all tokens
    joint    1l_10t_0.1h and the other points of the MUD paper's figure 1 (arXiv 2106.05691), and what the user names

Arms that choose the same numbers under two names are one arm: it is trained once.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, cast, get_args

from hf_compress.argument_values import one_of
from hf_compress.cache.selection import Depth, DepthScheme, LengthScheme, MaskReading, RankBy, Selection, WidthScheme
from hf_compress.errors import ArgumentError

Part = Literal["ends", "depth", "length", "width", "joint"]
PARTS: tuple[Part, ...] = get_args(Part)
DEFAULT_PARTS: tuple[Part, ...] = ("ends", "joint")
NONE, ALL = "none", "all"
JOINT = ("1l_10t_0.1h", "1l_30t_0.1h", "1l_50t_0.1h", "1l_50t_0.2h", "1l_50t_1.0h")
OWN = "own"  # the run's own layer map, where the others are schemes of the paper
DEPTHS: tuple[str, ...] = (OWN, *get_args(DepthScheme))
LENGTHS: tuple[LengthScheme, ...] = ("left_first", "attention", "attention_no_sep")
WIDTHS: tuple[WidthScheme, ...] = ("random", "uniform", "magnitude", "pca")
SCHEMES = (*DEPTHS, *LENGTHS, *WIDTHS)

LayerPairs = tuple[tuple[int, int], ...]


@dataclass(frozen=True)
class Arm:
    """One way to choose.

    Attributes:
        name: as in the table, and of its folder.
        part: of the study.
        scheme: what its curve is called: "t_top8", "attention", "pca"; "" at the ends, "joint" for joint ones.
        selection: None for no hidden states at all.
        also: other names of the same choice.
    """

    name: str
    part: Part
    scheme: str
    selection: Selection | None
    also: tuple[str, ...] = ()

    def flags(self) -> tuple[str, ...]:
        """What `hf-compress run` is told; nothing for no hidden states."""
        if self.selection is None:
            return ()
        chosen, flags = self.selection, ["--hsk", str(self.selection)]
        if chosen.depth.scheme is not None:
            flags += ["--hsk_layers", chosen.depth.scheme]
        if chosen.tokens is not None:
            flags += ["--hsk_length", chosen.length]
            if chosen.needs_importance:
                flags += ["--hsk_rank_by", chosen.rank_by]
        if chosen.width_scheme != "all":
            flags += ["--hsk_width", chosen.width_scheme]
            if chosen.width_scheme != "pca":
                flags += ["--hsk_mask", chosen.mask]
        return tuple(flags)

    def describe(self) -> str:
        """The selection in words."""
        return "no hidden states: the predictions alone" if self.selection is None else self.selection.describe()

    def to_json(self) -> dict[str, Any]:
        """For a record; `from_json` gives an equal arm back."""
        chosen = None if self.selection is None else self.selection.to_json()
        return {"name": self.name, "part": self.part, "scheme": self.scheme, "selection": chosen, "also": list(self.also)}

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Arm:
        """An arm out of a record."""
        chosen = None if value["selection"] is None else Selection.from_json(value["selection"])
        return cls(value["name"], value["part"], value["scheme"], chosen, tuple(value["also"]))


@dataclass(frozen=True)
class Choices:
    """What is to be compared.

    Attributes:
        parts: of the study.
        layers: amounts for depth; None for 1 to all there are.
        tokens: amounts for length.
        shares: amounts for width, above 0 and below 1.
        schemes: those to compare; for a part of which none is named, all.
        arms: more joint ones, as short forms: "2l_20t_0.5h".
        joint_layers, joint_length, joint_width: the schemes of joint arms; None for those that `hf-compress run` takes by default.
        rank_by: how attention ranks tokens, in every arm.
        mask: what becomes of the other dimensions, in every arm.
    """

    parts: tuple[Part, ...] = DEFAULT_PARTS
    layers: tuple[int, ...] | None = None
    tokens: tuple[int, ...] = (5, 10, 20, 50)
    shares: tuple[float, ...] = (0.05, 0.1, 0.2, 0.5)
    schemes: tuple[str, ...] = ()
    arms: tuple[str, ...] = ()
    joint_layers: DepthScheme | None = None
    joint_length: LengthScheme | None = None
    joint_width: WidthScheme | None = None
    rank_by: RankBy = "probabilities"
    mask: MaskReading = "ignore"

    def of(self, axis: Sequence[str]) -> tuple[str, ...]:
        """The schemes of one axis, in its order."""
        named = tuple(scheme for scheme in axis if scheme in self.schemes)
        return named or tuple(axis)


@dataclass(frozen=True)
class Layers:
    """The depths of both models, and the pairs that the run itself would compare.

    Attributes:
        student, teacher: numbers of layers, M and N.
        own: pairs (student layer, teacher layer) of the run's own map.
    """

    student: int
    teacher: int
    own: LayerPairs

    def pairs(self, selection: Selection | None) -> LayerPairs:
        """The pairs that a selection compares.

        Raises:
            ArgumentError: more layers than there are.
        """
        if selection is None:
            return ()
        return selection.depth.layer_map_pairs(self.student, self.teacher, self.own)


def planned_arms(choices: Choices, layers: Layers) -> tuple[Arm, ...]:
    """The arms of a study, each choice once.

    Raises:
        ArgumentError: a selection that these models do not have.
    """
    arms: dict[Any, Arm] = {}
    for arm in _every_arm(choices, layers):
        same = arms.setdefault(_numbers_of(arm, layers), arm)
        if same is not arm and arm.name not in (same.name, *same.also):
            arms[_numbers_of(arm, layers)] = replace(same, also=(*same.also, arm.name))
    return tuple(arms.values())


def _numbers_of(arm: Arm, layers: Layers) -> Any:
    """What tells two arms apart: which numbers are compared, and how."""
    chosen = arm.selection
    if chosen is None:
        return None
    ranked = chosen.rank_by if chosen.needs_importance else ""
    masked = chosen.mask if chosen.width_scheme not in ("all", "pca") else ""
    return layers.pairs(chosen), chosen.tokens, chosen.length, ranked, chosen.width, chosen.width_scheme, masked


def _every_arm(choices: Choices, layers: Layers) -> Iterator[Arm]:
    if "ends" in choices.parts:
        yield Arm(NONE, "ends", "", None)
        yield Arm(ALL, "ends", "", Selection.everything())
    if "depth" in choices.parts:
        for scheme in choices.of(DEPTHS):
            yield from _depths(choices, layers, None if scheme == OWN else cast(DepthScheme, scheme))
    if "length" in choices.parts:
        for length in cast("tuple[LengthScheme, ...]", choices.of(LENGTHS)):
            for tokens in choices.tokens:
                chosen = Selection(tokens=tokens, length=length, rank_by=choices.rank_by)
                yield Arm(f"{chosen}-{length}{_ranked(chosen)}", "length", length, chosen)
    if "width" in choices.parts:
        for width in cast("tuple[WidthScheme, ...]", choices.of(WIDTHS)):
            for share in choices.shares:
                chosen = Selection(width=share, width_scheme=width, mask="ignore" if width == "pca" else choices.mask)
                yield Arm(f"{chosen}-{width}{_masked(chosen)}", "width", width, chosen)
    for text in (*(JOINT if "joint" in choices.parts else ()), *choices.arms):
        yield joint_arm(text, choices)


def _depths(choices: Choices, layers: Layers, scheme: DepthScheme | None) -> Iterator[Arm]:
    most = len(Depth(None, scheme).layer_map_pairs(layers.student, layers.teacher, layers.own))
    for count in choices.layers or range(1, most + 1):
        chosen = Selection(depth=Depth(count, scheme))
        yield Arm(f"{chosen}-{scheme or OWN}", "depth", scheme or OWN, chosen)


def joint_arm(text: str, choices: Choices) -> Arm:
    """An arm out of a short form.

    Raises:
        ArgumentError: it is none; with the nearest.
    """
    if text.strip().lower() == NONE:
        return Arm(NONE, "ends", "", None)
    plain = Selection.parse(text, flag="arms")
    chosen = Selection.parse(
        text,
        scheme=choices.joint_layers if plain.depth.layers is not None else None,
        length=choices.joint_length if plain.tokens is not None else None,
        rank_by=choices.rank_by,
        width_scheme=choices.joint_width if plain.width < 1 else None,
        mask=choices.mask,
        flag="arms",
    )
    if chosen.width_scheme in ("all", "pca"):
        chosen = replace(chosen, mask="ignore")
    named: list[str | None] = [chosen.depth.scheme, chosen.length if chosen.length != plain.length else None]
    named += [chosen.width_scheme if chosen.width_scheme != plain.width_scheme else None]
    # The paper's own spelling stays: 1l_50t_1.0h.
    name = "-".join([text.strip().lower(), *filter(None, named)]) + _ranked(chosen) + _masked(chosen)
    return Arm(name, "ends" if name == ALL else "joint", "" if name == ALL else "joint", chosen)


def _ranked(chosen: Selection) -> str:
    return "-scores" if chosen.needs_importance and chosen.rank_by == "scores" else ""


def _masked(chosen: Selection) -> str:
    return "-zero_target" if chosen.width_scheme not in ("all", "pca") and chosen.mask == "zero_target" else ""


# --- what the user writes ---


def read_parts(text: str) -> tuple[Part, ...]:
    """ "ends,depth" -> the parts, in the order of a study.

    Raises:
        ArgumentError: an unknown part, with the nearest; none at all.
    """
    named = [one_of(part, PARTS, flag="study_parts") for part in _words(text, "study_parts", "ends,joint")]
    return tuple(part for part in PARTS if part in named)


def read_schemes(text: str) -> tuple[str, ...]:
    """ "own,pca" -> the schemes.

    Raises:
        ArgumentError: an unknown one, with the nearest; none at all.
    """
    return tuple(one_of(scheme, SCHEMES, flag="study_schemes") for scheme in _words(text, "study_schemes", "attention_no_sep,pca"))


def read_arms(text: str) -> tuple[str, ...]:
    """ "1l_10t_0.1h,2l" -> the short forms, which `joint_arm` reads.

    Raises:
        ArgumentError: none at all.
    """
    return tuple(_words(text, "arms", "1l_10t_0.1h,2l_20t_0.5h"))


def read_counts(text: str, flag: str, lowest: int = 1) -> tuple[int, ...]:
    """ "5,10" -> whole numbers, each once, in the order given.

    Raises:
        ArgumentError: something else.
    """
    found = []
    for word in _words(text, flag, "1,2,3"):
        if not word.isdecimal() or int(word) < lowest:
            raise ArgumentError(f"--{flag}: {word!r} is no whole number from {lowest} up; write for example 1,2,3.")
        found.append(int(word))
    return tuple(dict.fromkeys(found))


def read_shares(text: str) -> tuple[float, ...]:
    """ "0.05,0.1" -> shares of the dimensions, above 0 and below 1.

    Raises:
        ArgumentError: something else.
    """
    found = []
    for word in _words(text, "study_shares", "0.05,0.1"):
        try:
            share = float(word)
        except ValueError:
            share = 0.0
        if not 0 < share < 1:
            raise ArgumentError(f"--study_shares: {word!r} is no share of the dimensions, above 0 and below 1; write for example 0.05,0.1.")
        found.append(share)
    return tuple(dict.fromkeys(found))


def _words(text: str, flag: str, example: str) -> list[str]:
    words = [word.strip() for word in text.split(",") if word.strip()]
    if not words:
        raise ArgumentError(f"--{flag} is empty; write for example {example}.")
    return words
