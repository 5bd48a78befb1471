"""How texts are augmented: the numbers of Algorithm 1, and how it is read where the paper is silent or its code does otherwise.

                               by default                                    faithful="released_code"
words that are replaced        all with a letter or digit                    letters a-z only, no stop-words
the masked LM reads            the copy as it stands, masked (Algorithm 1)   the masked original, [SEP], the original
its candidates                 the K most probable whole words               the K most probable pieces, less '##' pieces
the word itself                is no candidate                               is one of the masked LM's
the vectors                    all of the file, neighbours that are words    the first 100,000, all neighbours
a copy that is there already   is drawn again, at most 3 N times             is left out, and counts towards N
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

from hf_compress.errors import ArgumentError

Candidates = Literal["per_copy", "per_word"]
Faithful = Literal["released_code"]

FIRST_VECTORS = 100_000  # that the released code reads
DRAWS = 3  # times N copies are drawn at most, until there are N different ones


@dataclass(frozen=True)
class AugmentationSettings:
    """The numbers and the reading of Algorithm 1.

    Attributes:
        probability: p_t, of a word to be replaced.
        num_copies: N_a, copies of each text.
        num_candidates: K, words among which one is drawn.
        seed: another one gives other copies.
        candidates: "per_copy" asks the masked LM about the copy as it stands, so that the words of a copy fit each other; "per_word"
            asks once about the original, whose answer serves all copies: up to N x p_t times fewer questions. By default "per_copy",
            and "per_word" where `faithful` asks for the released code.
        keep_stop_words: whether English function words stay as they are; by default only in the released code.
        faithful: "released_code" for what TinyBERT's own script does, see the table above.

    Raises:
        ArgumentError: a number out of its range, an unknown choice, or one that contradicts `faithful`.
    """

    probability: float = 0.4
    num_copies: int = 20
    num_candidates: int = 15
    seed: int = 42
    candidates: Candidates | None = None
    keep_stop_words: bool = False
    faithful: Faithful | None = None

    def __post_init__(self) -> None:
        if not 0.0 <= self.probability <= 1.0:
            raise ArgumentError(f"--probability is {self.probability}; expected a number from 0 to 1: the share of the words to replace.")
        for name in ("num_copies", "num_candidates"):
            if getattr(self, name) < 1:
                raise ArgumentError(f"--{name} is {getattr(self, name)}; expected at least 1.")
        if self.candidates not in (None, *get_args(Candidates)):
            raise ArgumentError(f"--candidates is '{self.candidates}'; expected {' or '.join(get_args(Candidates))}.")
        if self.faithful not in (None, *get_args(Faithful)):
            raise ArgumentError(f"--faithful is '{self.faithful}'; expected {' or '.join(get_args(Faithful))}, or nothing.")
        if self.faithful and self.candidates == "per_copy":
            raise ArgumentError(
                "--candidates per_copy contradicts --faithful released_code, which asks once a word. Leave one of them out."
            )

    @property
    def as_released(self) -> bool:
        """Whether TinyBERT's own script is followed."""
        return self.faithful == "released_code"

    @property
    def per_copy(self) -> bool:
        """Whether the masked LM reads the copies rather than the original."""
        return not self.as_released and self.candidates != "per_word"

    @property
    def skips_stop_words(self) -> bool:
        """Whether function words stay as they are."""
        return self.keep_stop_words or self.as_released

    @property
    def most_draws(self) -> int:
        """How often a text is copied at most, to get `num_copies` different ones."""
        return self.num_copies if self.as_released else DRAWS * self.num_copies
