"""The papers behind a compressed model, for its card: by recipe, by loss, and by what was done to its layers."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True)
class Paper:
    """A paper on arXiv.

    Attributes:
        arxiv: its number there, as in "1503.02531".
        author: of the first author the family name and the given name.
        title: as the paper has it.
    """

    arxiv: str
    author: str
    title: str

    @property
    def link(self) -> str:
        """In Markdown."""
        return f"[{self.title}](https://arxiv.org/abs/{self.arxiv}) ({self.author.partition(',')[0]} et al., {self.year})"

    @property
    def year(self) -> int:
        """When it was put on arXiv."""
        return 2000 + int(self.arxiv[:2])

    @property
    def bibtex(self) -> str:
        """An entry for BibTeX."""
        key = f"{self.author.partition(',')[0]}{self.year}{self.title.partition(' ')[0].strip(':,')}".lower()
        return (
            f"@misc{{{key},\n  title = {{{{{self.title}}}}},\n  author = {{{self.author} and others}},\n  year = {{{self.year}}},\n"
            f"  eprint = {{{self.arxiv}}},\n  archivePrefix = {{arXiv}}\n}}"
        )


_KNOWLEDGE = Paper("1503.02531", "Hinton, Geoffrey", "Distilling the Knowledge in a Neural Network")
_TINYBERT = Paper("1909.10351", "Jiao, Xiaoqi", "TinyBERT: Distilling BERT for Natural Language Understanding")
_DISTILBERT = Paper("1910.01108", "Sanh, Victor", "DistilBERT, a distilled version of BERT: smaller, faster, cheaper and lighter")
_PKD = Paper("1908.09355", "Sun, Siqi", "Patient Knowledge Distillation for BERT Model Compression")
_MUD = Paper("2106.05691", "Liu, Yuanxin", "Marginal Utility Diminishes: Exploring the Minimum Knowledge for BERT Knowledge Distillation")
_MINILM = Paper(
    "2002.10957",
    "Wang, Wenhui",
    "MiniLM: Deep Self-Attention Distillation for Task-Agnostic Compression of Pre-Trained Transformers",
)
_MINILMV2 = Paper(
    "2012.15828",
    "Wang, Wenhui",
    "MiniLMv2: Multi-Head Self-Attention Relation Distillation for Compressing Pretrained Transformers",
)
_FITNETS = Paper("1412.6550", "Romero, Adriana", "FitNets: Hints for Thin Deep Nets")
_CKD = Paper("2010.03034", "Wu, Yimeng", "Why Skip If You Can Combine: A Simple Knowledge Distillation Technique for Intermediate Layers")
_ALP = Paper("2012.14022", "Passban, Peyman", "ALP-KD: Attention-Based Layer Projection for Knowledge Distillation")
_EMD = Paper("2010.06133", "Li, Jianquan", "BERT-EMD: Many-to-Many Layer Mapping for BERT Compression with Earth Mover's Distance")
_MOBILEBERT = Paper("2004.02984", "Sun, Zhiqing", "MobileBERT: a Compact Task-Agnostic BERT for Resource-Limited Devices")

DROPPING = Paper("2004.03844", "Sajjad, Hassan", "On the Effect of Dropping Layers of Pre-trained Transformer Models")
PRUNING = Paper("2103.11367", "Liu, Yuanxin", "ROSITA: Refined BERT cOmpreSsion with InTegrAted techniques")
LITTLE_OF_THE_TEACHER = _MUD

OF_RECIPE: dict[str, tuple[Paper, ...]] = {
    "layerwise": (_KNOWLEDGE, _TINYBERT),
    "logits": (_KNOWLEDGE,),
    "distilbert": (_DISTILBERT, _KNOWLEDGE),
    "tinybert": (_TINYBERT,),
    "tinybert_general": (_TINYBERT,),
    "pkd": (_PKD, _KNOWLEDGE),
    "mud": (_MUD,),
    "minilm": (_MINILM,),
    "minilmv2": (_MINILMV2,),
    "fitnets": (_FITNETS, _KNOWLEDGE),
    "ckd": (_CKD, _KNOWLEDGE),
    "alp": (_ALP, _KNOWLEDGE),
    "emd": (_EMD,),
    "mobilebert": (_MOBILEBERT, _KNOWLEDGE),
}
# What each loss is of, for losses that are given one by one.
OF_LOSS: dict[str, tuple[Paper, ...]] = {
    "labels": (),
    "logits": (_KNOWLEDGE,),
    "hidden_states": (_TINYBERT,),
    "embeddings": (_TINYBERT,),
    "attention_scores": (_TINYBERT,),
    "attentions": (_MINILM,),
    "query_relations": (_MINILMV2,),
    "key_relations": (_MINILMV2,),
    "value_relations": (_MINILM,),
    "hint": (_FITNETS,),
    "combined_layers": (_CKD,),
    "mixed_layers": (_ALP,),
    "hidden_states_transport": (_EMD,),
    "attention_scores_transport": (_EMD,),
}


def papers_of(recipe: str | None, losses: Iterable[str]) -> tuple[Paper, ...]:
    """Those of a recipe; without one those of the losses, each once.

    Args:
        recipe: its name; None for losses that were given in Python.
        losses: the names of the losses that acted.
    """
    if recipe is None:
        return unique(paper for name in losses for paper in OF_LOSS.get(name, ()))
    return OF_RECIPE.get(recipe, ())


def unique(papers: Iterable[Paper]) -> tuple[Paper, ...]:
    """Each paper once, in the order given."""
    return tuple(dict.fromkeys(papers))
