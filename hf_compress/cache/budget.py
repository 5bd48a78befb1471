"""The best teacher on disk for so many bytes: depth, length, width and number format, chosen by what each of them loses.

    candidates: depths x tokens x widths x number formats  --bytes of each, by `file_sizes`-->  is the budget enough for any?
                                                           --what each loses, by `distortion`-->  the least loss that fits

Of candidates that lose the same the smallest is taken. What half the bytes and twice as many would buy is said beside it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import count, product

from hf_compress.cache.codec_name import CodecName
from hf_compress.cache.distortion import Distortion
from hf_compress.cache.file_sizes import FileSizes
from hf_compress.cache.price import readable
from hf_compress.cache.selection import Depth, LengthScheme, Selection, WidthScheme
from hf_compress.errors import ArgumentError, CacheError
from hf_compress.signals import SignalSpec

TOKENS = (1, 2, 3, 5, 7, 10, 15, 20, 30, 50, 70, 100, 150, 200, 300, 500)
WIDTHS = (0.02, 0.03, 0.05, 0.07, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.7)
CODECS: tuple[CodecName, ...] = ("float16", "int8")
_EVERYTHING = Selection.everything()
# Losses that agree in so many decimals are the same: more bytes for the rest would be wasted.
_DECIMALS = 5

# What is stored beside, and of, hidden states that are cut down to a selection.
Asked = Callable[[Selection], SignalSpec]


@dataclass(frozen=True)
class Possible:
    """What may be chosen from.

    Attributes:
        depths: each with the signals that go with it.
        tokens: numbers of tokens an example, None for all.
        length: how tokens are chosen, where not all are.
        widths: shares of the dimensions, along the leading directions (pca).
        whole: the share that is all there is, and its scheme: (1.0, "all") of a teacher.
        codecs: number formats.
        other: the selection whose other attributes all have.
        learnt_on: of how many tokens the sample is that a pca basis is learnt on, where so many of an example are kept; it cannot have
            more directions than that.
    """

    depths: tuple[tuple[Depth, SignalSpec], ...]
    tokens: tuple[int | None, ...]
    length: LengthScheme
    widths: tuple[float, ...]
    whole: tuple[float, WidthScheme] = (1.0, "all")
    codecs: tuple[CodecName, ...] = CODECS
    other: Selection = _EVERYTHING
    learnt_on: Callable[[int | None], int] = lambda tokens: 2**31

    def dimensions(self, hidden_size: int) -> list[int]:
        """How many dimensions each of `widths` is."""
        return [self.selection(Depth(), None, width).num_dimensions(hidden_size) for width in self.widths]

    def selection(self, depth: Depth, tokens: int | None, width: float) -> Selection:
        """One of them."""
        scheme: WidthScheme = self.whole[1] if width == self.whole[0] else "pca"
        length: LengthScheme = "all" if tokens is None else self.length
        return replace(self.other, depth=depth, tokens=tokens, length=length, width=width, width_scheme=scheme)


@dataclass(frozen=True)
class Candidate:
    """One way to keep part of the hidden states.

    Attributes:
        selection, codec: what is kept, and in which numbers.
        spec: all signals that are stored.
        least: its bytes, but for headers.
        lost: the share of the hidden states' variance that is lost; NaN until it is measured.
    """

    selection: Selection
    codec: CodecName
    spec: SignalSpec
    least: int
    lost: float = float("nan")

    @property
    def order(self) -> tuple[float, int]:
        """By what is lost, then by bytes."""
        return round(self.lost, _DECIMALS), self.least


@dataclass(frozen=True)
class Choice:
    """What was chosen.

    Attributes:
        chosen: the candidate.
        bytes: all files but the manifest.
    """

    chosen: Candidate
    bytes: int

    def __str__(self) -> str:
        chosen = self.chosen
        return f"--hsk {chosen.selection}, {chosen.codec}: {readable(self.bytes)}, loses {_percent(chosen.lost)}"


@dataclass(frozen=True)
class Choices:
    """What was chosen for a budget, and what would have been for others.

    Attributes:
        budget: bytes.
        best: for the budget.
        half, twice: for half of it and twice as much; None where nothing fits, or nothing more is to be had.
    """

    budget: int
    best: Choice
    half: Choice | None
    twice: Choice | None

    def lines(self) -> list[str]:
        """What a log says of it."""
        chosen, share = self.best.chosen, self.best.bytes / self.budget
        lines = [
            f"{readable(self.budget)} for the teacher on disk: --hsk {chosen.selection.describe()}, {chosen.codec}, takes "
            f"{readable(self.best.bytes)} ({share:.0%}) and loses {_percent(chosen.lost)} of the hidden states' variance"
        ]
        lines += [f"for half of it: {self.half}"] if self.half is not None else []
        lines += [f"for twice as much: {self.twice}"] if self.twice is not None else []
        return lines


def choose(
    budget: int, possible: Possible, sizes: FileSizes, measure: Callable[[], Distortion], flag: str = "teacher_cache_budget"
) -> Choices:
    """Choose what loses least.

    Args:
        budget: bytes of all files but the manifest.
        possible: what to choose from.
        sizes: of the examples in question.
        measure: asked only once something is known to fit; its widths are the numbers of dimensions of `possible.widths`.
        flag: where the budget was given.

    Raises:
        ArgumentError: nothing fits; the message has the least that is needed, and what would fit.
    """
    candidates = list(_candidates(possible, sizes))
    smallest = min(candidates, key=lambda each: each.least)
    if sizes.total(smallest.spec, smallest.selection, smallest.codec) > budget:
        raise _too_little(budget, candidates, sizes, flag)
    measured = sorted(_measured(candidates, possible, measure()), key=lambda each: each.order)
    best = _best(measured, budget, sizes)
    if best is None:
        codecs = ", ".join(possible.codecs)
        raise ArgumentError(
            f"The teacher's hidden states hold numbers too large for {codecs}: add --teacher_cache_dtype bfloat16 or float32."
        )
    twice = _best(measured, 2 * budget, sizes)
    return Choices(budget, best, _best(measured, budget // 2, sizes), None if twice == best else twice)


def _best(measured: Iterable[Candidate], budget: int, sizes: FileSizes) -> Choice | None:
    """The first that fits, of candidates in their order."""
    for candidate in measured:
        if candidate.least <= budget and candidate.lost < float("inf"):
            size = sizes.total(candidate.spec, candidate.selection, candidate.codec)
            if size <= budget:
                return Choice(candidate, size)
    return None


def _candidates(possible: Possible, sizes: FileSizes) -> Iterable[Candidate]:
    widths = (*possible.widths, possible.whole[0])
    for (depth, spec), tokens, width, codec in product(possible.depths, possible.tokens, widths, possible.codecs):
        selection = possible.selection(depth, tokens, width)
        hidden = max(sizes.teacher.stacks[key.stack].hidden_size for key in spec.hidden_states)
        if width != possible.whole[0] and selection.num_dimensions(hidden) > possible.learnt_on(tokens):
            continue
        yield Candidate(selection, codec, spec, sizes.least(spec, selection, codec))


def _measured(candidates: Sequence[Candidate], possible: Possible, distortion: Distortion) -> Iterable[Candidate]:
    places = {width: place for place, width in enumerate((*possible.widths, possible.whole[0]))}
    known: dict[tuple[frozenset[int], int | None], list[list[float]]] = {}
    for candidate in candidates:
        layers = frozenset(key.layer for key in candidate.spec.hidden_states)
        asked = (layers, candidate.selection.tokens)
        if asked not in known:
            known[asked] = distortion.lost(sorted(layers), candidate.selection.tokens).tolist()
        lost = known[asked][possible.codecs.index(candidate.codec)][places[candidate.selection.width]]
        yield replace(candidate, lost=lost)


def _too_little(budget: int, candidates: Sequence[Candidate], sizes: FileSizes, flag: str) -> ArgumentError:
    smallest = min(candidates, key=lambda each: each.least)
    needed = sizes.total(smallest.spec, smallest.selection, smallest.codec)
    examples = len(sizes.records)
    ways = ["give at least that", f"take fewer examples ({needed / examples:,.0f} bytes each)"]
    if smallest.spec.attention_scores:
        ways.append("leave the attention scores out (--distill_weights attention_scores=0), which are stored whole")
    if smallest.spec.logits:
        alone = sizes.total(SignalSpec(logits=True), Selection.everything(), smallest.codec)
        ways.append(f"store the logits alone (--distill_recipe logits: {alone:,} bytes)")
    return ArgumentError(
        f"--{flag} is {budget:,} bytes, and the least that keeps any hidden states, {smallest.selection} as {smallest.codec}, takes "
        f"{needed:,} bytes for {examples:,} examples: {', '.join(ways[:-1])}, or {ways[-1]}."
    )


def _percent(share: float) -> str:
    """0.1234 -> "12.3%"; what is not nothing is not called so."""
    return f"{share:.1%}" if share >= 0.0005 or share == 0 else "under 0.1%"


def depths_of(asked: Asked, other: Selection = _EVERYTHING) -> tuple[tuple[Depth, SignalSpec], ...]:
    """The depths there are, from one pair of layers to all, each with its signals.

    Args:
        asked: tells what a selection is stored with.
        other: the selection whose other attributes all have.
    """
    everything = asked(replace(other, depth=Depth()))
    found: list[tuple[Depth, SignalSpec]] = []
    for layers in count(1):
        try:
            spec = asked(replace(other, depth=Depth(layers)))
        except (ArgumentError, CacheError):  # there are no more pairs
            break
        if spec.hidden_states == everything.hidden_states:
            break
        found.append((Depth(layers), spec))
    return (*found, (Depth(), everything))


def possible_widths(hidden_size: int, widest: float = 1.0) -> tuple[float, ...]:
    """Shares of the dimensions below `widest`, of which no two are the same number of dimensions."""
    counts = {Selection(width=width, width_scheme="pca").num_dimensions(hidden_size): width for width in WIDTHS if width < widest}
    return tuple(counts[number] for number in sorted(counts))


def possible_tokens(most: int, widest: int | None = None) -> tuple[int | None, ...]:
    """Numbers of tokens to choose from.

    Args:
        most: as many as the longest example has to choose from; more would be the same.
        widest: the largest number that can be had; None where all tokens can.
    """
    return (*(number for number in TOKENS if number < (most if widest is None else widest)), widest)
