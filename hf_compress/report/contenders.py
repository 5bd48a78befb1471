"""What is compared: everything that reads a review and its reply and says 0 or 1, and says how large it is.

Two of them know no word order: the majority class, and a logistic regression on the words.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from sklearn.feature_extraction.text import CountVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import Pipeline, make_pipeline
from torch import nn
from transformers import AutoModelForSequenceClassification, AutoTokenizer, PreTrainedTokenizerBase

from hf_compress.report.corpus import Example


class Contender(Protocol):
    """Something that labels examples."""

    def predict(self, examples: Sequence[Example]) -> list[int]:
        """One label an example, from its text."""
        ...

    def size(self) -> tuple[int, int]:
        """Number of parameters, and bytes that they take in memory."""
        ...


class MajorityClass:
    """The most frequent label of the training set, whatever is asked.

    Args:
        examples: the training set.
    """

    def __init__(self, examples: Sequence[Example]) -> None:
        labels = [example.label for example in examples]
        self.label = max(sorted(set(labels)), key=labels.count)

    def predict(self, examples: Sequence[Example]) -> list[int]:
        """The same label for all."""
        return [self.label] * len(examples)

    def size(self) -> tuple[int, int]:
        """It has no parameters."""
        return 0, 0


class BagOfWords:
    """Logistic regression on the words of both sentences, their order forgotten; those of the reply count on their own.

    Args:
        examples: the training set.
    """

    def __init__(self, examples: Sequence[Example]) -> None:
        self.model: Pipeline = make_pipeline(
            CountVectorizer(token_pattern=r"\S+", binary=True, lowercase=False), LogisticRegression(max_iter=1000)
        )
        self.model.fit(self._texts(examples), [example.label for example in examples])

    def predict(self, examples: Sequence[Example]) -> list[int]:
        """The likelier label."""
        return [int(label) for label in self.model.predict(self._texts(examples))]

    def size(self) -> tuple[int, int]:
        """One weight a word, and the intercept."""
        weights: list[np.ndarray] = [self.model[-1].coef_, self.model[-1].intercept_]
        return sum(each.size for each in weights), sum(each.nbytes for each in weights)

    @staticmethod
    def _texts(examples: Sequence[Example]) -> list[str]:
        return [" ".join([example.review, *(f"reply:{word}" for word in example.reply.split())]) for example in examples]


class Transformer:
    """A model and its tokenizer.

    Args:
        model: for sequence classification.
        tokenizer: of the same vocabulary.
    """

    def __init__(self, model: nn.Module, tokenizer: PreTrainedTokenizerBase) -> None:
        self.model = model
        self.tokenizer = tokenizer

    @classmethod
    def load(cls, folder: Path) -> Transformer:
        """Both from a folder, as anybody else loads them."""
        return cls(AutoModelForSequenceClassification.from_pretrained(folder), AutoTokenizer.from_pretrained(folder))

    @torch.inference_mode()
    def predict(self, examples: Sequence[Example]) -> list[int]:
        """The likelier label."""
        self.model.eval()
        texts = [example.review for example in examples], [example.reply for example in examples]
        batch = self.tokenizer(*texts, padding=True, return_tensors="pt")
        logits: torch.Tensor = self.model(**batch).logits  # (examples, 2)
        labels: list[int] = logits.argmax(-1).tolist()
        return labels

    def size(self) -> tuple[int, int]:
        """Each parameter counted once; bytes as they lie in memory."""
        parameters = list(self.model.parameters())
        return sum(each.numel() for each in parameters), sum(each.numel() * each.element_size() for each in parameters)
