"""`hf-compress augment TRAIN.csv -o OUT.csv`: more examples out of few, by replacing words."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import get_args

from hf_compress.augmentation.settings import AugmentationSettings, Candidates, Faithful
from hf_compress.augmentation.suffixes import check_output
from hf_compress.cli.flags import FlagParser
from hf_compress.errors import ArgumentError

STOPPED = 130


def main(argv: Sequence[str]) -> int:
    """Augment a file; returns the exit code: 0, or 130 if it was stopped by Ctrl-C."""
    flags = _parser().parse(argv)
    settings = AugmentationSettings(
        probability=flags.probability,
        num_copies=flags.num_copies,
        num_candidates=flags.num_candidates,
        seed=flags.seed,
        candidates=flags.candidates,
        keep_stop_words=flags.keep_stop_words,
        faithful=flags.faithful,
    )
    if flags.batch_tokens is not None and flags.batch_tokens < 1:
        raise ArgumentError(f"--batch_tokens is {flags.batch_tokens}; expected at least 1.")
    if flags.mlm is None and flags.vectors is None:
        raise ArgumentError("There is nothing to take words from: give a masked LM (--mlm), word vectors (--vectors), or both.")
    check_output(Path(flags.output_file), flags.source, overwrite=flags.overwrite)
    columns = None if flags.text_columns is None else [name.strip() for name in flags.text_columns.split(",") if name.strip()]

    # From here on with torch and transformers, which the help need not wait for.
    from hf_compress.augmentation.augment_file import augment_file

    try:
        written = augment_file(
            flags.source,
            flags.output_file,
            settings,
            mlm=flags.mlm,
            vectors=flags.vectors,
            text_columns=columns,
            batch_tokens=flags.batch_tokens,
            overwrite=flags.overwrite,
        )
    except KeyboardInterrupt:
        kept = Path(f"{flags.output_file}.partial")
        print(f"\nstopped; the same command goes on{f' from {kept}' if kept.exists() else ''}", file=sys.stderr)
        return STOPPED
    print(f"{written.path}: {written.examples:,} examples became {written.rows:,}")
    return 0


def _parser() -> FlagParser:
    parser = FlagParser(
        "augment",
        "Copies of examples in which words were replaced by others that fit (TinyBERT, arXiv 1909.10351, Algorithm 1): by those that a "
        "masked LM finds probable in their place, or, for words that are several tokens, by near ones among word vectors. The labels are "
        "copied. A run that was stopped goes on when the same command is given again.",
    )
    parser.add_argument(
        "source", metavar="TRAIN", help="A .csv, .tsv, .json, .jsonl or .parquet file, or a data set of the hub, as nyu-mll/glue:mrpc."
    )
    parser.flag("output_file", "-o", required=True, metavar="OUT", help="Where the examples go; .csv, .tsv, .json, .jsonl or .parquet.")
    parser.flag("mlm", metavar="MODEL", help="A masked LM: a folder or a name on the hub. Without it vectors serve for all words.")
    parser.flag("vectors", metavar="FILE", help="Word vectors, a text file of GloVe or word2vec. Without it the masked LM serves for all.")
    parser.flag("probability", type=float, default=0.4, metavar="P", help="Of a word to be replaced; by default 0.4.")
    parser.flag("num_copies", type=int, default=20, metavar="N", help="Copies of each text, of both in a pair; by default 20.")
    parser.flag("num_candidates", type=int, default=15, metavar="K", help="Words among which one is drawn; by default 15.")
    parser.flag("seed", type=int, default=42, metavar="N", help="Another one gives other copies; by default 42.")
    parser.flag("text_columns", metavar="NAMES", help="As sentence1,sentence2; by default the first one or two columns of texts.")
    parser.flag(
        "candidates",
        choices=get_args(Candidates),
        help="per_copy (the default): the masked LM reads each copy as it stands; per_word: the original, once for all copies, which is "
        "several times faster.",
    )
    parser.flag("keep_stop_words", action="store_true", help="Leave English function words as they are.")
    parser.flag("faithful", choices=get_args(Faithful), help="Do as TinyBERT's own script does, where it differs from the paper.")
    parser.flag("batch_tokens", type=int, metavar="N", help="Tokens a forward; by default 32768 on a GPU and 1024 elsewhere.")
    parser.flag("overwrite", action="store_true", help="Replace OUT if it is there.")
    return parser
