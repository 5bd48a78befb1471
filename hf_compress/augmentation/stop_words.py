"""English function words, which TinyBERT's released code leaves as they are: NLTK's list without its question words and apostrophes."""

from __future__ import annotations

_PRONOUNS = """
i me my myself we our ours ourselves you your yours yourself yourselves he him his himself she her hers herself it its itself they them
their theirs themselves this that these those
"""
_VERBS = "am is are was were be been being have has had having do does did doing can will should"
_CONJUNCTIONS_AND_PREPOSITIONS = """
and but if or because as until while of at by for with about against between into through during before after above below to from up down
in out on off over under than
"""
_ADVERBS_AND_DETERMINERS = """
a an the again further then once here there all any both each few more most other some such no nor not only own same so too very just now
"""
# What tokenizers make of contractions: don't is don and t.
_PARTS_OF_CONTRACTIONS = """
s t d ll m o re ve y ma ain aren couldn didn doesn don hadn hasn haven isn mightn mustn needn shan shouldn wasn weren won wouldn
"""

STOP_WORDS = frozenset(
    " ".join((_PRONOUNS, _VERBS, _CONJUNCTIONS_AND_PREPOSITIONS, _ADVERBS_AND_DETERMINERS, _PARTS_OF_CONTRACTIONS)).split()
)
