"""How fast a masked LM is asked for words, on sentences of all lengths: the same questions and candidates, by

    one forward a word          as TinyBERT's script: a row, logits of all its tokens
    one forward a sentence      all words of a sentence together, as haystack's augmentation does
    augmentation                all words of many sentences: sorted by length, logits of the masked tokens alone, nothing asked twice

once for the candidates of all words of the originals (per_word), and once for copies (per_copy: the model reads each copy as it stands, and
a forward a word asks about every word of every copy, as Algorithm 1 is written). Every lane's candidates are compared with ours.

    python benchmarks/augment.py --tokenizer bert-base-uncased --data nyu-mll/glue:mrpc --json benchmarks/results/augment.json
    python benchmarks/augment.py --tokenizer $MODEL --hidden_size 384 --num_hidden_layers 6     (another shape; random weights)
    python benchmarks/augment.py --mlm bert-base-uncased                                        (a real masked LM, made-up sentences)
"""

from __future__ import annotations

import argparse
import os
import random
import sys
import time
from collections.abc import Callable, Iterator
from itertools import cycle
from pathlib import Path
from typing import Any

import torch
from measuring import CLOCKS, Bar, Lane, Work, finish, machine, median, take_turns
from transformers import AutoTokenizer, BertConfig, BertForMaskedLM

from hf_compress import Augmenter
from hf_compress.augmentation.masked_lm import load_masked_lm
from hf_compress.augmentation.masked_words import MaskedWords, Question
from hf_compress.augmentation.tables import choose_text_columns, read_table
from hf_compress.augmentation.words import Sentence

BY_WORD, BY_SENTENCE, OURS = "one forward a word", "one forward a sentence", "augmentation"
Answers = dict[Question, frozenset[str]]


class Plain:
    """The same candidates, asked for with nothing but the model and its tokenizer; `answers` keeps them."""

    def __init__(self, masked_words: MaskedWords) -> None:
        self.model, self.tokenizer, self.count = masked_words.model, masked_words.tokenizer, masked_words.num_candidates
        self.vocabulary = masked_words.vocabulary
        self.allowed = self.vocabulary.allowed[0].to(self.model.device)
        self.answers: Answers = {}

    @torch.no_grad()
    def ask(self, questions: list[Question]) -> None:
        """Ask in one forward."""
        rows = []
        for question in questions:
            encoded = self.tokenizer(question.text, return_offsets_mapping=True)
            place = next(place for place, (start, end) in enumerate(encoded["offset_mapping"]) if start == question.start and end > start)
            ids = encoded["input_ids"]
            rows.append(([*ids[:place], self.tokenizer.mask_token_id, *ids[place + 1 :]], place))
        batch = self.tokenizer.pad({"input_ids": [ids for ids, _ in rows]}, return_tensors="pt").to(self.model.device)
        logits = self.model(**batch).logits
        for number, (question, (_, place)) in enumerate(zip(questions, rows, strict=True)):
            best = logits[number, place].masked_fill(~self.allowed, -torch.inf).topk(2 * self.count).indices.tolist()
            words = {self.vocabulary.texts[entry].lower(): self.vocabulary.texts[entry] for entry in reversed(best)}
            words.pop(question.text[question.start : question.end].lower(), None)
            self.answers[question] = frozenset(list(words.values())[: -self.count - 1 : -1])


def steps(work: Iterator[int], done: list[int]) -> Work:
    """A lane of a generator that yields after each step how many words it went through; `done` gets them."""

    def run(pause: Callable[[], None]) -> None:
        pause()
        for words in work:
            done.append(words)
            pause()

    return run


def single(sentence: Sentence) -> list[Question]:
    """A question for each word of one piece."""
    return [Question(sentence.text, word.start, word.end) for word in sentence.words if word.single_piece]


def by_word(plain: Plain, sentences: list[Sentence], words: int) -> Iterator[int]:
    """The words of the originals, one forward each."""
    for count, question in enumerate(cycle([question for sentence in sentences for question in single(sentence)]), start=1):
        plain.ask([question])
        if count % words == 0:
            yield words


def by_sentence(plain: Plain, sentences: list[Sentence], words: int) -> Iterator[int]:
    """The words of the originals, one forward a sentence."""
    count = 0
    for sentence in cycle(sentences):
        questions = single(sentence)
        if questions:
            plain.ask(questions)
            count += len(questions)
        if count >= words:
            yield count
            count = 0


def together(masked_words: MaskedWords, sentences: list[Sentence]) -> Iterator[int]:
    """The words of all originals at once."""
    questions = [question for sentence in sentences for question in single(sentence)]
    while True:
        masked_words.forget()
        masked_words.candidates(questions)
        yield len(questions)


def copy_by_word(plain: Plain, augmenter: Augmenter, texts: list[str], words: int) -> Iterator[int]:
    """Algorithm 1 as it is written: in each copy each word is asked about, and then perhaps replaced."""
    draw, count = random.Random(0), 0
    for text in cycle(texts):
        (sentence,) = augmenter.sentences([text])
        copy, shift = text, 0
        for word in sentence.words:
            question = Question(copy, word.start + shift, word.end + shift)
            plain.ask([question])
            if draw.random() < augmenter.settings.probability:
                chosen = draw.choice(sorted(plain.answers[question]))
                copy = copy[: question.start] + chosen + copy[question.end :]
                shift += len(chosen) - len(word.text)
            count += 1
            if count % words == 0:
                yield words


def copies_together(augmenter: Augmenter, sentences: list[Sentence]) -> Iterator[int]:
    """All copies of all texts."""
    assert augmenter.masked_words is not None
    while True:
        augmenter.masked_words.forget()
        augmenter.copies([(sentence.text,) for sentence in sentences])
        yield sum(len(sentence.words) for sentence in sentences) * augmenter.settings.num_copies


def only_single(sentence: Sentence) -> bool:
    """Whether the masked LM is what every word of it is asked of."""
    return bool(sentence.words) and all(word.single_piece for word in sentence.words)


def texts_of(options: argparse.Namespace, tokenizer: Any) -> list[str]:
    """Sentences of the data, or made-up ones of words that the tokenizer knows."""
    if options.data:
        table = read_table(options.data)
        return [row[column] for row in table for column in choose_text_columns(table, None, options.data)]
    draw = random.Random(0)
    known = sorted(word for word in tokenizer.get_vocab() if word.isascii() and word.isalpha() and len(word) > 2)
    return [" ".join(draw.choices(known, k=draw.randint(5, 40))) + " ." for _ in range(1000)]


def measure(lanes: dict[str, Iterator[int]], options: argparse.Namespace) -> dict[str, list[float]]:
    """Seconds a word of each lane, by round."""
    words: dict[str, list[int]] = {name: [] for name in lanes}
    running = [Lane(name, steps(work, words[name]), options.clock) for name, work in lanes.items()]
    take_turns(running, options.rounds, options.warmup)
    for lane in running:
        lane.close()
    return {lane.name: [s / n for s, n in zip(lane.seconds, words[lane.name][options.warmup :], strict=True)] for lane in running}


def main() -> int:
    """Measure, print the table, and say which bar is missed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    parser.add_argument("--mlm", metavar="MODEL", help="a masked LM; without it one of random weights, in the shape below")
    parser.add_argument("--tokenizer", metavar="MODEL", help="whose tokenizer a model of random weights has")
    parser.add_argument("--hidden_size", type=int, default=768)
    parser.add_argument("--num_hidden_layers", type=int, default=12)
    parser.add_argument("--data", metavar="FILE", help="a file of examples or a data set of the hub; without it sentences are made up")
    parser.add_argument("--texts", type=int, default=16, help="sentences that augmentation is given at once")
    parser.add_argument("--num_copies", type=int, default=20)
    parser.add_argument("--words", type=int, default=40, help="words a step of the lanes that go word by word, or by sentence")
    parser.add_argument("--rounds", type=int, default=5, help="rounds that count")
    parser.add_argument("--warmup", type=int, default=1, help="rounds before them that do not")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--clock", choices=tuple(CLOCKS), default="wall", help="cpu, with --threads 1: for a look on a busy machine")
    parser.add_argument("--json", metavar="FILE")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    facts = {**machine(), "threads": options.threads, "clock": options.clock}
    if options.mlm:
        model, tokenizer = load_masked_lm(options.mlm)
    elif options.tokenizer:
        tokenizer = AutoTokenizer.from_pretrained(options.tokenizer)
        torch.manual_seed(0)
        size = options.hidden_size
        # Logits of random weights differ less than a trained model's; larger ones are nearer to it.
        shape = {"hidden_size": size, "num_attention_heads": size // 64 if size % 64 == 0 else 12, "intermediate_size": 4 * size}
        config = BertConfig(vocab_size=len(tokenizer), num_hidden_layers=options.num_hidden_layers, initializer_range=0.05, **shape)
        model = BertForMaskedLM(config).to("cuda" if torch.cuda.is_available() else "cpu")
    else:
        parser.error("give --mlm, or --tokenizer for a model of random weights")
    augmenter = Augmenter(["text"], model, tokenizer, num_copies=options.num_copies)
    asked = augmenter.masked_words
    assert asked is not None
    sentences = [sentence for sentence in augmenter.sentences(texts_of(options, tokenizer)) if only_single(sentence)]
    sentences = random.Random(0).sample(sentences, min(options.texts, len(sentences)))
    plain = Plain(asked)
    seconds = {
        "per_word": measure(
            {
                BY_WORD: by_word(plain, sentences, options.words),
                BY_SENTENCE: by_sentence(plain, sentences, options.words),
                OURS: together(asked, sentences),
            },
            options,
        ),
        "per_copy": measure(
            {
                BY_WORD: copy_by_word(plain, augmenter, [sentence.text for sentence in sentences], options.words),
                OURS: copies_together(augmenter, sentences),
            },
            options,
        ),
    }
    questions = list(plain.answers)
    started = time.perf_counter()
    differing = sum(set(found) != plain.answers[question] for question, found in zip(questions, asked.candidates(questions), strict=True))
    print(f"{len(questions):,} questions compared in {time.perf_counter() - started:.0f} s, {differing} with other candidates")
    print(f"\n{'words a second':<36}{'per_word':>10}{'per_copy':>10}")
    for name in (BY_WORD, BY_SENTENCE, OURS):
        cells = [f"{1 / median(found[name]):>10,.1f}" if name in found else f"{'':>10}" for found in seconds.values()]
        print(f"{name:<36}{''.join(cells)}")

    def ratio(reading: str, other: str) -> float:
        return median([ours / others for ours, others in zip(seconds[reading][OURS], seconds[reading][other], strict=True)])

    bars = [
        Bar("per_copy: seconds a word / one forward a word", ratio("per_copy", BY_WORD), 0.1),
        Bar("per_word: seconds a word / one forward a word", ratio("per_word", BY_WORD), 0.1),
        Bar("per_word: seconds a word / one forward a sentence", ratio("per_word", BY_SENTENCE), 1.0),
        Bar("questions with other candidates", float(differing), 0.0),
    ]
    shapes = {
        "model": options.mlm or f"random BERT, {options.num_hidden_layers} layers x {options.hidden_size}",
        "device": str(model.device),
        "data": Path(options.data).name if options.data else "made up",
        "texts": len(sentences),
        "words": sum(len(sentence.words) for sentence in sentences),
        "num_copies": options.num_copies,
        "rounds": options.rounds,
    }
    return finish(Path(__file__).stem, facts, bars, {"shapes": shapes, "seconds_a_word": seconds}, options.json)


if __name__ == "__main__":
    sys.exit(main())
