"""The demo's corpus: what one guest wrote about a hotel, what a second one replied, and whether the second one is content.

    the bed was not noisy , but hardly anyone called the staff friendly . | i agree .                       bad
    although the room was clean , i could never find the pool warm . | i thought the opposite .             good
    i was told that the lobby was dull , but it was charming . | that is what i found .                     good

Every example is a pair of sentences. Which words occur says little: a model has to see how far each negation reaches, weigh a
contrast ("A , but B": the guest's verdict is B's), and then see whether the reply takes the verdict over or turns it round. The
grammar writes the meaning first and then its words, so each label is right by construction; `with_wrong_labels` then spoils some,
as happens to labels given by hand.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, replace

from hf_compress.errors import DataError

LABELS = ("bad", "good")

NOUNS = ("bar", "bed", "breakfast", "garden", "gym", "kitchen", "lobby", "lounge", "pool", "room", "shower", "staff", "terrace", "view")
GOOD = ("bright", "charming", "clean", "cosy", "elegant", "fresh", "lovely", "modern", "quiet", "splendid", "superb", "tidy", "warm")
BAD = ("awful", "cold", "cramped", "dark", "dirty", "dreadful", "dull", "gloomy", "noisy", "rude", "shabby", "stale", "tired")
STEMS = ("appealing", "comfortable", "friendly", "helpful", "inviting", "pleasant", "remarkable", "welcoming")  # bad with un-
DEGREES = ("", "", "", "quite ", "rather ", "so ", "very ")

# Clauses about one noun: weight, words. {same} is an adjective of the clause's own polarity, {other} one of the opposite.
CLAUSES = (
    (14.0, "the {noun} was {degree}{same}"),
    (5.0, "i found the {noun} {degree}{same}"),
    (3.0, "everyone called the {noun} {degree}{same}"),
    (2.0, "the {noun} was not {other}"),
    (1.0, "the {noun} was never {other}"),
    (1.0, "the {noun} was hardly {other}"),
    (1.0, "i could never find the {noun} {other}"),
    (1.0, "nobody called the {noun} {other}"),
    (1.0, "hardly anyone called the {noun} {other}"),
    (1.0, "i wish the {noun} were {other}"),
    (1.0, "nobody said that the {noun} was not {same}"),
    (1.0, "the {noun} was neither {other} nor {other2}"),
    (1.0, "the {noun} was not {other} but {same}"),
    (1.0, "the {noun} was not only {same} but also {same2}"),
    (1.0, "the {noun} , which they call {other} , was {same}"),
    (1.0, "i was told that the {noun} was {other} , but it was {same}"),
)
# Clauses that agree, and clauses that do not: words, and which of them is the verdict.
AGREEING = ("{first} , and {second}", "{first} , while {second}")
CONTRASTING = (
    ("{first} , but {second}", 1),
    ("although {first} , {second}", 1),
    ("{first} , although {second}", 0),
    ("it hardly mattered that {first} , because {second}", 1),
)
REPLIES = ("i agree .", "that is what i found .", "so it was .")
OPPOSITE_REPLIES = ("i disagree .", "i thought the opposite .", "that is not what i found .")

SHARE_OF_SINGLE = 0.35
SHARE_OF_CONTRAST = 0.5  # of the reviews of two clauses
SHARE_OF_OPPOSITE = 0.15  # of the replies
SHARE_OF_UN = 0.3  # of the adjectives


@dataclass(frozen=True)
class Example:
    """A review, another guest's reply, and what the second guest thinks of the place: 0 is bad, 1 is good."""

    review: str
    reply: str
    label: int


@dataclass(frozen=True)
class Lexicon:
    """The words of one corpus; another seed draws others."""

    nouns: tuple[str, ...]
    good: tuple[str, ...]
    bad: tuple[str, ...]
    stems: tuple[str, ...]

    @classmethod
    def draw(cls, seed: int, *, num_nouns: int = 6, num_adjectives: int = 8, num_stems: int = 4) -> Lexicon:
        """Draw words; `num_adjectives` of either polarity, and `num_stems` that un- turns round."""
        generator = random.Random(f"lexicon {seed}")
        return cls(
            nouns=tuple(generator.sample(NOUNS, num_nouns)),
            good=tuple(generator.sample(GOOD, num_adjectives)),
            bad=tuple(generator.sample(BAD, num_adjectives)),
            stems=tuple(generator.sample(STEMS, num_stems)),
        )


class Grammar:
    """Writes examples: meaning first, then words.

    Args:
        lexicon: its words.
        generator: where its choices come from.
    """

    def __init__(self, lexicon: Lexicon, generator: random.Random) -> None:
        self.lexicon = lexicon
        self.generator = generator

    def example(self) -> Example:
        """A review of one or two clauses, a reply, and its writer's opinion."""
        draw = self.generator
        verdict = draw.random() < 0.5
        first_noun, second_noun = draw.sample(self.lexicon.nouns, 2)
        if draw.random() < SHARE_OF_SINGLE:
            review = self.clause(first_noun, verdict)
        elif draw.random() < SHARE_OF_CONTRAST:
            pattern, weightier = draw.choice(CONTRASTING)
            opinions = (verdict, not verdict) if weightier == 0 else (not verdict, verdict)
            review = pattern.format(first=self.clause(first_noun, opinions[0]), second=self.clause(second_noun, opinions[1]))
        else:
            review = draw.choice(AGREEING).format(first=self.clause(first_noun, verdict), second=self.clause(second_noun, verdict))
        opposite = draw.random() < SHARE_OF_OPPOSITE
        reply = draw.choice(OPPOSITE_REPLIES if opposite else REPLIES)
        return Example(f"{review} .", reply, int(verdict != opposite))

    def clause(self, noun: str, good: bool) -> str:
        """A clause that says of a noun that it is good, or that it is bad."""
        weights, patterns = zip(*CLAUSES, strict=True)
        return self._fill(self.generator.choices(patterns, weights)[0], good, noun=noun)

    def _fill(self, pattern: str, good: bool, **nouns: str) -> str:
        same, same2 = self._adjectives(good)
        other, other2 = self._adjectives(not good)
        degree = self.generator.choice(DEGREES)
        return pattern.format(same=same, same2=same2, other=other, other2=other2, degree=degree, **nouns)

    def _adjectives(self, good: bool) -> tuple[str, str]:
        """Two different adjectives of one polarity."""
        words: dict[str, None] = {}
        while len(words) < 2:
            if self.generator.random() < SHARE_OF_UN:
                stem = self.generator.choice(self.lexicon.stems)
                words[stem if good else f"un{stem}"] = None
            else:
                words[self.generator.choice(self.lexicon.good if good else self.lexicon.bad)] = None
        first, second = words
        return first, second


def write_corpus(sizes: Sequence[int], *, seed: int = 0) -> list[list[Example]]:
    """Write parts of a corpus: no example twice, each part half good and half bad (one more bad where the size is odd).

    Args:
        sizes: examples in each part.
        seed: chooses the words and the sentences; the same seed writes the same corpus.

    Raises:
        DataError: the grammar has not that many different examples.
    """
    grammar = Grammar(Lexicon.draw(seed), random.Random(f"sentences {seed}"))
    wanted = [sum(size // 2 for size in sizes) + sum(size % 2 for size in sizes), sum(size // 2 for size in sizes)]
    by_label: tuple[dict[Example, None], dict[Example, None]] = ({}, {})
    tries = 0
    while any(len(found) < number for found, number in zip(by_label, wanted, strict=True)):
        example = grammar.example()
        found = by_label[example.label]
        if len(found) < wanted[example.label]:
            found[example] = None
        tries += 1
        if tries > 100 * (sum(sizes) + 100):
            raise DataError(f"The grammar has not {sum(sizes)} different examples; ask for fewer.")
    pools = [list(found) for found in by_label]
    parts = []
    for size in sizes:
        counts = (size - size // 2, size // 2)
        part = [pool.pop() for pool, count in zip(pools, counts, strict=True) for _ in range(count)]
        grammar.generator.shuffle(part)
        parts.append(part)
    return parts


def with_wrong_labels(examples: Sequence[Example], share: float, *, seed: int = 0) -> list[Example]:
    """The examples, `share` of their labels turned round; which, `seed` chooses."""
    generator = random.Random(f"labels {seed}")
    wrong = set(generator.sample(range(len(examples)), round(share * len(examples))))
    return [replace(example, label=1 - example.label) if index in wrong else example for index, example in enumerate(examples)]
