"""How much of the teacher's hidden states is kept: depth, then length, then width (MUD, arXiv 2106.05691).

    1l_10t_0.1h
    |  |   +---- width:  0.1 of the dimensions      random, uniform, magnitude, pca
    |  +-------- length: 10 tokens an example       left_first, attention, attention_no_sep
    +----------- depth:  the top pair of layers     t_top8, t_top10, t_top12, the run's own map, or pairs

A part that is absent keeps everything; "all" keeps everything. A selection is words and numbers: which tokens and dimensions it means
for a batch is worked out in `tokens` and `widths`. No torch here.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, fields
from decimal import Decimal
from difflib import get_close_matches
from fractions import Fraction
from typing import Any, Literal, get_args

from hf_compress.errors import ArgumentError, CacheError

DepthScheme = Literal["t_top8", "t_top10", "t_top12"]
LengthScheme = Literal["all", "left_first", "attention", "attention_no_sep"]
RankBy = Literal["probabilities", "scores"]
WidthScheme = Literal["all", "random", "uniform", "magnitude", "pca"]
MaskReading = Literal["zero_target", "ignore"]

# The paper names the teacher layer that teaches the student's last one, of 12. For other depths it is a share of the depth.
_TOP: Mapping[str, Fraction] = {"t_top8": Fraction(2, 3), "t_top10": Fraction(5, 6), "t_top12": Fraction(1)}
_NUMBER = re.compile(r"([0-9]{1,9}(?:\.[0-9]{1,40})?|\.[0-9]{1,40})([lth])")
_EXAMPLE = "1l_10t_0.1h"


@dataclass(frozen=True)
class Depth:
    """Which teacher layers teach which student layers.

    Attributes:
        layers: how many pairs, counted from the student's last layer down; None for all.
        scheme: student layer i learns from teacher layer round(i * L / M), i = 0..M, with L = 2/3, 5/6 or all of the teacher's depth;
            None for the run's own map.
        pairs: (student layer, teacher layer), instead of a scheme; kept in the student's order.
    """

    layers: int | None = None
    scheme: DepthScheme | None = None
    pairs: tuple[tuple[int, int], ...] | None = None

    def __post_init__(self) -> None:
        _check_count("layers", self.layers)
        if self.scheme is not None:
            _check_choice("depth scheme", self.scheme, get_args(DepthScheme))
        if self.pairs is None:
            return
        if self.scheme is not None:
            raise ArgumentError(f"The depth has pairs of layers and the scheme {self.scheme!r}: give one of the two.")
        for pair in self.pairs:
            if len(pair) != 2 or not all(_is_whole(layer) and layer >= 0 for layer in pair):
                raise ArgumentError(f"The depth pairs {pair!r}: write (student layer, teacher layer) from 0, the embedding output, up.")
        students = [student for student, _ in self.pairs]
        if not students or len(set(students)) < len(students):
            raise ArgumentError(f"The depth has the pairs {self.pairs!r}: give at least one, and each student layer once.")
        object.__setattr__(self, "pairs", tuple(sorted((student, teacher) for student, teacher in self.pairs)))
        self._top(self.pairs)

    def layer_map_pairs(
        self, num_student_layers: int, num_teacher_layers: int, own: Sequence[tuple[int, int]] | None = None
    ) -> tuple[tuple[int, int], ...]:
        """The pairs (student layer, teacher layer), ascending; layers count from 1, 0 is the embedding output.

        Args:
            num_student_layers, num_teacher_layers: M and N.
            own: the pairs of the run's own map, which counts where there is neither scheme nor pairs.

        Raises:
            ArgumentError: more layers than there are pairs, pairs that the models do not have, a student deeper than its teacher, or no
                `own` where it counts.

        >>> Depth(2, "t_top10").layer_map_pairs(4, 12)
        ((3, 8), (4, 10))
        """
        if self.scheme is not None:
            if not 1 <= num_student_layers <= num_teacher_layers:
                raise ArgumentError(
                    f"The depth scheme {self.scheme} needs a teacher at least as deep as the student, but the student has "
                    f"{num_student_layers} layers and the teacher {num_teacher_layers}. Give pairs, such as 1:1,2:{num_teacher_layers}."
                )
            top = round(_TOP[self.scheme] * num_teacher_layers)
            # round() of an exact fraction: halves to the even layer, as in the paper's code
            every = tuple((i, round(Fraction(i * top, num_student_layers))) for i in range(num_student_layers + 1))
            return self._top(every)
        chosen = self.pairs if self.pairs is not None else own
        if chosen is None:
            raise ArgumentError("The depth follows the run's own layer map, and there is none: give a depth scheme, or pairs of layers.")
        for student, teacher in chosen:
            if student > num_student_layers or teacher > num_teacher_layers:
                depths = f"the student has {num_student_layers} layers and the teacher {num_teacher_layers}"
                raise ArgumentError(f"The depth pairs {student}:{teacher}, but {depths}.")
        return self._top(tuple(sorted(chosen)))

    def _top(self, pairs: tuple[tuple[int, int], ...]) -> tuple[tuple[int, int], ...]:
        if self.layers is None:
            return pairs
        if self.layers > len(pairs):
            listed = ",".join(f"{student}:{teacher}" for student, teacher in pairs)
            raise ArgumentError(
                f"{self.layers}l asks for {self.layers} pairs of layers, but there are {len(pairs)} ({listed}): write {len(pairs)}l."
            )
        return pairs[-self.layers :]


@dataclass(frozen=True)
class Selection:
    """Everything that says which hidden states a cache holds, or which of them a run reads.

    Attributes:
        depth: see `Depth`.
        tokens: how many tokens of an example, in each layer; None for all.
        length: how they are chosen. "left_first" takes the first ones; "attention" those that the summary token attends to most, in the
            teacher's layer (`ranking_layer`); "attention_no_sep" the same without special tokens but the summary token.
        rank_by: attention as probabilities, or as scores before the softmax, as the paper's released code has it; mean over heads.
        width: share of the dimensions, in (0, 1].
        width_scheme: "random" and "uniform" keep the same dimensions for everything; "magnitude" keeps each example's largest entries;
            "pca" compares in the directions in which the teacher's states vary most.
        mask: "zero_target", as the paper's released code, pulls the student's other dimensions to 0; "ignore" leaves them alone.
        seed: of the random dimensions, and of the sample that a pca basis is learnt on.

    Raises:
        ArgumentError: a value out of range, an unknown name, or two attributes that contradict each other.
    """

    depth: Depth = field(default_factory=Depth)
    tokens: int | None = None
    length: LengthScheme = "all"
    rank_by: RankBy = "probabilities"
    width: float = 1.0
    width_scheme: WidthScheme = "all"
    mask: MaskReading = "ignore"
    seed: int = 0

    def __post_init__(self) -> None:
        _check_count("tokens", self.tokens)
        _check_choice("length scheme", self.length, get_args(LengthScheme))
        _check_choice("ranking", self.rank_by, get_args(RankBy))
        _check_choice("width scheme", self.width_scheme, get_args(WidthScheme))
        _check_choice("reading of the mask", self.mask, get_args(MaskReading))
        if isinstance(self.width, bool) or not isinstance(self.width, int | float) or not 0 < self.width <= 1:
            raise ArgumentError(f"The width is {self.width!r}: give the share of dimensions to keep, above 0 and at most 1, such as 0.1.")
        object.__setattr__(self, "width", float(self.width))
        if not _is_whole(self.seed) or not 0 <= self.seed < 2**32:
            raise ArgumentError(f"The selection's seed is {self.seed!r}: give a whole number from 0 to 2^32 - 1.")
        if (self.tokens is None) != (self.length == "all"):
            raise ArgumentError(
                f"The length scheme is {self.length!r} and the number of tokens {self.tokens}: give a number, such as 10t, with "
                "left_first, attention or attention_no_sep, and none with all."
            )
        if (self.width == 1) != (self.width_scheme == "all"):
            raise ArgumentError(
                f"The width scheme is {self.width_scheme!r} and the width {self.width}: give a share below 1, such as 0.1h, with "
                "random, uniform, magnitude or pca, and none with all."
            )

    @classmethod
    def everything(cls) -> Selection:
        """All layers of the run's own map, all tokens, all dimensions."""
        return cls()

    @classmethod
    def parse(
        cls,
        text: str,
        *,
        scheme: DepthScheme | None = None,
        length: LengthScheme | None = None,
        rank_by: RankBy | None = None,
        width_scheme: WidthScheme | None = None,
        mask: MaskReading | None = None,
        seed: int = 0,
        flag: str = "hidden_states_selection",
    ) -> Selection:
        """A selection from the paper's short form: "1l_10t_0.1h", "10t", "1l_0.1h", "all".

        None takes the default: the top pairs of the run's own map, attention_no_sep by probabilities,
        pca, ignore. "1.0h" is all dimensions, whatever the scheme.

        Raises:
            ArgumentError: not the short form (the message has the nearest valid text), or a scheme for a part that is absent.
        """
        layers, tokens, width = _read_short_form(text, flag)
        if tokens is None and length not in (None, "all"):
            raise ArgumentError(f"--{flag}: the length scheme is {length!r}, but {text!r} has no number of tokens: add 10t.")
        if width is None and width_scheme not in (None, "all"):
            raise ArgumentError(f"--{flag}: the width scheme is {width_scheme!r}, but {text!r} has no share of dimensions: add 0.1h.")
        share = width or 1.0
        return cls(
            depth=Depth(layers, scheme),
            tokens=tokens,
            length="all" if tokens is None else length or "attention_no_sep",
            rank_by=rank_by or "probabilities",
            width=share,
            width_scheme="all" if share == 1 else width_scheme or "pca",
            mask=mask or "ignore",
            seed=seed,
        )

    def __str__(self) -> str:
        layers = self.depth.layers or (len(self.depth.pairs) if self.depth.pairs else None)
        return _short_form(layers, self.tokens, self.width if self.width < 1 else None)

    def describe(self) -> str:
        """The short form with the schemes behind it, for logs and messages."""
        pairs = ",".join(f"{student}:{teacher}" for student, teacher in self.depth.pairs or ())
        words = [f"layers {pairs or self.depth.scheme or 'of the map of the run'}"]
        if self.length != "all":
            words.append(f"tokens {self.length}" + (f", by {self.rank_by}" if self.needs_importance else ""))
        if self.width_scheme != "all":
            words.append(f"dimensions {self.width_scheme}, {self.mask}")
        return f"{self} ({'; '.join(words)})"

    @property
    def needs_importance(self) -> bool:
        """Whether tokens are ranked by the teacher's attention."""
        return self.length in ("attention", "attention_no_sep")

    def num_dimensions(self, hidden_size: int) -> int:
        """How many dimensions of `hidden_size` are kept: int(width * hidden_size) as in the paper's code, at least 1."""
        return max(1, int(self.width * hidden_size))

    def num_entries(self, num_tokens: int, hidden_size: int) -> int:
        """How many numbers "magnitude" keeps of an example's `num_tokens` chosen tokens in one layer: at least 1 where there is a token."""
        return max(1, int(self.width * (num_tokens * hidden_size))) if num_tokens else 0

    def to_json(self) -> dict[str, Any]:
        """As a dictionary that JSON can hold; `from_json` gives an equal selection back."""
        pairs = None if self.depth.pairs is None else [list(pair) for pair in self.depth.pairs]
        own = {part.name: getattr(self, part.name) for part in fields(self)}
        return {**own, "depth": {"layers": self.depth.layers, "scheme": self.depth.scheme, "pairs": pairs}}

    @classmethod
    def from_json(cls, value: object) -> Selection:
        """A selection as a manifest holds it.

        Raises:
            CacheError: an entry is missing, unknown, of another type, or has a value that no selection has.
        """
        entries = _entries(value, "selection", {part.name for part in fields(cls)})
        depth = _entries(entries["depth"], "selection.depth", {"layers", "scheme", "pairs"})
        try:
            pairs = None if depth["pairs"] is None else tuple((*pair,) for pair in depth["pairs"])
            return cls(**{**entries, "depth": Depth(depth["layers"], depth["scheme"], pairs)})
        except (ArgumentError, TypeError) as error:  # TypeError: what should be a list of lists is none
            raise CacheError(f"The manifest's selection is not valid. {error}") from None

    def within(
        self, larger: Selection, *, layers: Collection[int], stored_layers: Collection[int], importance: Collection[RankBy] = ()
    ) -> str | None:
        """Whether this selection can be read, without a teacher, from a cache that was built with `larger`.

        Args:
            larger: what the cache was built with.
            layers: the teacher layers that this selection asks for.
            stored_layers: the teacher layers that the cache holds.
            importance: the rankings by which it holds each token's importance, where it holds all tokens.

        Returns:
            None if it can; else why not, as a phrase about the cache: "it holds 10 tokens an example, not 30".
        """
        return _depth_reason(layers, stored_layers) or _length_reason(self, larger, importance) or _width_reason(self, larger)


def ranking_layer(teacher_layer: int) -> int:
    """The layer whose attention ranks the tokens of this layer's output: itself; layer 1 for the embedding output, 0."""
    return max(teacher_layer, 1)


def _depth_reason(layers: Collection[int], stored: Collection[int]) -> str | None:
    absent = sorted(set(layers) - set(stored))
    if not absent:
        return None
    listed, held = (", ".join(map(str, numbers)) for numbers in (absent, sorted(set(stored))))
    return f"it does not hold teacher layer {listed}; it holds {held or 'none'}"


def _length_reason(asked: Selection, stored: Selection, importance: Collection[RankBy]) -> str | None:
    if stored.tokens is None:
        ranks = not asked.needs_importance or asked.rank_by in importance
        return None if ranks else f"it holds all tokens, but not their {asked.rank_by}, by which {asked.length} ranks them"
    if asked.tokens is None:
        return f"it holds {stored.tokens} tokens an example, not all"
    if asked.length != stored.length:
        return f"its tokens were chosen by {stored.length}, not {asked.length}"
    if asked.needs_importance and asked.rank_by != stored.rank_by:
        return f"its tokens were ranked by {stored.rank_by}, not {asked.rank_by}"
    if asked.tokens > stored.tokens:
        return f"it holds {stored.tokens} tokens an example, not {asked.tokens}"
    return None


def _width_reason(asked: Selection, stored: Selection) -> str | None:
    if stored.width_scheme == "all":
        return None
    held = _plain(stored.width)
    if asked.width_scheme == "all":
        return f"it holds {held} of the dimensions ({stored.width_scheme}), not all"
    wanted = _plain(asked.width)
    if asked.width_scheme != stored.width_scheme:
        return f"its dimensions were chosen by {stored.width_scheme}, not {asked.width_scheme}"
    if asked.width_scheme in ("random", "pca") and asked.seed != stored.seed:
        return f"its {asked.width_scheme} dimensions come from seed {stored.seed}, not {asked.seed}"
    if asked.width_scheme == "uniform" and asked.width != stored.width:
        return f"its uniform dimensions are those of share {held}, and those of {wanted} are not among them"
    if asked.width > stored.width:
        return f"it holds {held} of the dimensions, not {wanted}"
    # The largest entries of fewer tokens need not be among the largest of more tokens.
    if asked.width_scheme == "magnitude" and asked.tokens != stored.tokens:
        return f"its largest entries are those of {stored.tokens or 'all'} tokens together, not of {asked.tokens or 'all'}"
    return None


def _read_short_form(text: str, flag: str) -> tuple[int | None, int | None, float | None]:
    words = str(text).strip().lower()
    numbers: dict[str, str] = {}
    for part in [] if words == "all" else words.split("_"):
        found = _NUMBER.fullmatch(part)
        if found is None:
            raise _no_selection(text, flag, f"{part!r} is no number of layers (1l), tokens (10t) or share of dimensions (0.1h)")
        number, letter = found.groups()
        if letter in numbers:
            raise _no_selection(text, flag, f"it has two parts ending in {letter}")
        if numbers and "lth".index(letter) < "lth".index(next(reversed(numbers))):
            raise _no_selection(text, flag, "layers come first, then tokens, then the share of dimensions")
        if letter == "h" and not 0 < float(number) <= 1:
            raise _no_selection(text, flag, f"{part!r} is no share of the dimensions, above 0 and at most 1")
        if letter != "h" and ("." in number or int(number) < 1):
            raise _no_selection(text, flag, f"{part!r} is no whole number from 1 up")
        numbers[letter] = number
    layers, tokens = (int(numbers[letter]) if letter in numbers else None for letter in "lt")
    return layers, tokens, float(numbers["h"]) if "h" in numbers else None


def _no_selection(text: str, flag: str, reason: str) -> ArgumentError:
    return ArgumentError(f"--{flag}: {text!r} is no selection: {reason}. Write {_nearest(str(text))}, or all for everything.")


def _nearest(text: str) -> str:
    """The valid short form that is most like what was written."""
    counts: dict[str, int] = {}
    share = None
    for number, percent, letter in re.findall(r"([0-9]{1,9}(?:\.[0-9]{1,9})?|\.[0-9]{1,9})\s*(%?)\s*([lth]?)", text.lower()):
        value = float(number)
        if letter == "h" or (not letter and (percent or 0 < value < 1)):
            if percent or (value > 1 and "." not in number):  # 10h is meant as 0.1h
                value /= 100
            share = min(value, 1.0) or 0.1
        elif letter:
            counts[letter] = min(max(1, round(value)), 10**9 - 1)
    near = _short_form(counts.get("l"), counts.get("t"), share)
    return _EXAMPLE if near == "all" else near


def _short_form(layers: int | None, tokens: int | None, width: float | None) -> str:
    parts = [f"{layers}l" if layers else "", f"{tokens}t" if tokens else "", f"{_plain(width)}h" if width else ""]
    return "_".join(filter(None, parts)) or "all"


def _plain(number: float) -> str:
    """The shortest text that reads as this number, without an exponent."""
    return format(Decimal(repr(number)), "f")


def _is_whole(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _check_count(name: str, value: int | None) -> None:
    if value is not None and (not _is_whole(value) or value < 1):
        raise ArgumentError(f"The selection's number of {name} is {value!r}: give a whole number from 1 up, or None for all.")


def _check_choice(what: str, value: object, known: Sequence[str]) -> None:
    if value not in known:
        near = get_close_matches(str(value), known, n=1, cutoff=0.5)
        hint = f" Did you mean {near[0]!r}?" if near else ""
        raise ArgumentError(f"There is no {what} {value!r}.{hint} Known: {', '.join(known)}.")


def _entries(value: object, name: str, expected: set[str]) -> dict[str, Any]:
    if not isinstance(value, dict) or set(value) != expected:
        found = ", ".join(sorted(map(str, value))) if isinstance(value, dict) else repr(value)
        raise CacheError(f"The manifest's {name} holds {found or 'nothing'}; expected the entries {', '.join(sorted(expected))}.")
    return value
