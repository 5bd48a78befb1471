"""`hf-compress prune TEACHER -o DIR`: a student cut out of the teacher, ready for a script's `--model_name_or_path`."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, get_args

from hf_compress.argument_values import layer_numbers
from hf_compress.cli.flags import FlagParser
from hf_compress.errors import ArgumentError
from hf_compress.layers.strategies import LayerDropStrategy


def main(argv: Sequence[str]) -> int:
    """Prune, write the student with the teacher's tokenizer, and print what was kept; returns the exit code."""
    flags = _parser().parse(argv)
    kept = None if flags.layers_to_keep is None else layer_numbers(flags.layers_to_keep, flag="layers_to_keep")
    for name in ("num_examples", "batch_size", "max_seq_length"):
        if getattr(flags, name) < 1:
            raise ArgumentError(f"--{name} is {getattr(flags, name)}; expected at least 1.")
    output_dir = Path(flags.output_dir)
    if output_dir.is_dir() and any(output_dir.iterdir()) and not flags.overwrite:
        raise ArgumentError(f"{output_dir} is not empty. Name another folder, or add --overwrite to write the student there.")

    # From here on with torch and transformers, which the help need not wait for.
    import torch

    from hf_compress.card.facts import write_student_card
    from hf_compress.cli.labelled_sample import labelled_sample
    from hf_compress.cli.sizes import size_table
    from hf_compress.scripts.run_glue import DataArguments
    from hf_compress.students.from_teacher import load_teacher
    from hf_compress.students.prune import prune_student
    from hf_compress.students.pruned_models import Pruned
    from hf_compress.students.pruning_record import describe_pruning, recorded_pruning
    from hf_compress.students.save import check_output_dir, save_student

    check_output_dir(output_dir, flags.teacher)
    data = None
    if flags.task_name is not None or flags.train_file is not None:
        try:
            data = DataArguments(
                task_name=flags.task_name, train_file=flags.train_file, max_seq_length=flags.max_seq_length, pad_to_max_length=False
            )
        except ValueError as error:
            raise ArgumentError(str(error)) from error
    teacher: Any = load_teacher(flags.teacher)
    teacher.to("cuda" if torch.cuda.is_available() else "cpu")
    student = prune_student(
        teacher,
        None
        if data is None
        else labelled_sample(teacher, flags.teacher, data, num_examples=flags.num_examples, batch_size=flags.batch_size, seed=flags.seed),
        num_hidden_layers=flags.num_hidden_layers,
        layers_to_keep=kept,
        layer_drop_strategy=flags.layer_drop_strategy,
        num_attention_heads=flags.num_attention_heads,
        intermediate_size=flags.intermediate_size,
        embedding_rank=flags.embedding_rank,
        num_examples=flags.num_examples,
        faithful=flags.faithful,
    )
    processor = save_student(student, output_dir, flags.teacher)
    write_student_card(output_dir, student, teacher, flags.teacher)
    print(describe_pruning(student.config))
    pruning = recorded_pruning(student.config)
    if data is not None and pruning is not None and not pruning.num_examples and flags.layer_drop_strategy != "contribution":
        print("hf-compress: note: there was nothing to be ranked, so the examples were not read.", file=sys.stderr)
    print(size_table(teacher, student, names=("teacher", "student")))
    print(f"\n{output_dir}: {type(student).__name__}, {processor or 'no tokenizer was found beside the teacher'}")
    if isinstance(student, Pruned):
        print("To load it elsewhere than under `hf-compress run`, the script needs `import hf_compress`.")
    return 0


def _parser() -> FlagParser:
    parser = FlagParser(
        "prune", "Make a student of the teacher's most important parts: fewer layers, heads, feed-forward neurons, smaller embeddings."
    )
    parser.add_argument("teacher", metavar="TEACHER", help="A folder, or the name of a model on the Hub: BERT, RoBERTa or DistilBERT.")
    parser.flag("output_dir", "-o", required=True, metavar="DIR", help="Where the student goes.")
    parser.flag("overwrite", action="store_true", help="Write there even if the folder is not empty.")
    parser.flag("num_hidden_layers", type=int, metavar="N", help="How many layers stay: the first, or as --layer_drop_strategy says.")
    parser.flag("layers_to_keep", metavar="LAYERS", help="The layers that stay instead, counted from 1: 1,4,8,12 or 1-4.")
    parser.flag(
        "layer_drop_strategy",
        "--strategy",
        choices=get_args(LayerDropStrategy),
        default="top",
        help="Which layers go; by default the top ones.",
    )
    parser.flag("num_attention_heads", type=int, metavar="N", help="How many heads stay in each layer; they keep their size.")
    parser.flag("intermediate_size", type=int, metavar="N", help="How many feed-forward neurons stay in each layer.")
    parser.flag("embedding_rank", type=int, metavar="N", help="The rank of the word embeddings, at most the width.")
    parser.flag("task_name", metavar="TASK", help="The GLUE task whose training examples tell what is important.")
    parser.flag(
        "train_file", metavar="FILE", help="A .csv, .json or .parquet file with such examples, in place of a task's own or without a task."
    )
    parser.flag("num_examples", type=int, metavar="N", default=512, help="How many of them, drawn at random; by default 512.")
    parser.flag("batch_size", type=int, metavar="N", default=32, help="Examples in a batch; by default 32.")
    parser.flag("max_seq_length", type=int, metavar="N", default=128, help="Longer texts are cut to so many tokens; by default 128.")
    parser.flag("seed", type=int, metavar="N", default=42, help="Which examples are drawn; by default 42.")
    parser.flag("faithful", choices=("released_code",), help="Add up importance as the code behind ROSITA does.")
    return parser
