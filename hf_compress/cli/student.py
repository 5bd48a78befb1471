"""`hf-compress student TEACHER -o DIR`: a student on disk, ready for a script's `--model_name_or_path`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

from hf_compress.argument_values import layer_numbers
from hf_compress.cli.flags import FlagParser
from hf_compress.errors import ArgumentError

if TYPE_CHECKING:
    from hf_compress.scripts.run_glue import DataArguments


def main(argv: Sequence[str]) -> int:
    """Make a student, write it with the teacher's tokenizer, and print how large both are; returns the exit code."""
    parser = FlagParser(
        "student", "Make a student: of the teacher's own layers, or of its design at another width, at random or fitted to it."
    )
    parser.add_argument(
        "teacher", metavar="TEACHER", help="A folder, or the name of a model on the Hub; or a General TinyBERT, which is taken as it is."
    )
    parser.flag("output_dir", "-o", required=True, metavar="DIR", help="Where the student goes.")
    parser.flag("layers_to_keep", metavar="LAYERS", help="The teacher's layers to keep, counted from 1: 1,4,8,12 or 1-4.")
    parser.flag("num_hidden_layers", type=int, metavar="N", help="How many layers; without another width, spread over the teacher's.")
    parser.flag("hidden_size", type=int, metavar="N", help="Another width; the weights are then as --init says.")
    parser.flag("num_attention_heads", type=int, metavar="N", help="By default the teacher's number.")
    parser.flag("intermediate_size", type=int, metavar="N", help="Feed-forward size; by default in the teacher's ratio to the width.")
    parser.flag(
        "init",
        choices=("random", "pca"),
        default="random",
        help="Weights of another width: random, or fitted on texts to what the teacher computes (BERT, RoBERTa, DistilBERT).",
    )
    parser.flag("task_name", metavar="TASK", help="For --init pca: the GLUE task whose training texts it is fitted on.")
    parser.flag("train_file", metavar="FILE", help="Texts of one's own instead, as run_glue.py reads them: .csv, .json or .parquet.")
    parser.flag("num_examples", type=int, metavar="N", default=512, help="How many, at most, drawn at random; by default 512.")
    parser.flag("max_seq_length", type=int, metavar="N", default=128, help="Longer texts are cut to so many tokens; by default 128.")
    parser.flag("seed", type=int, metavar="N", default=42, help="For random weights and the texts that are drawn; by default 42.")
    flags = parser.parse(argv)
    _check_texts(flags)
    kept = None if flags.layers_to_keep is None else layer_numbers(flags.layers_to_keep, flag="layers_to_keep")

    # From here on with torch and transformers, which the help need not wait for.
    import torch

    from hf_compress.card.facts import write_student_card
    from hf_compress.cli.sizes import size_table
    from hf_compress.cli.text_sample import text_sample
    from hf_compress.layers.record import recorded_drop
    from hf_compress.layers.strategies import describe_layers
    from hf_compress.projections import ATTRIBUTE
    from hf_compress.students.from_teacher import load_teacher, student_from_teacher, without_task
    from hf_compress.students.save import check_output_dir, save_student
    from hf_compress.students.tinybert import is_general_tinybert
    from hf_compress.students.warm_record import describe_warm_start, recorded_warm_start

    check_output_dir(flags.output_dir, flags.teacher)
    if is_general_tinybert(flags.teacher):
        return _of_general_tinybert(flags)
    teacher = load_teacher(flags.teacher)
    examples = None
    if flags.init == "pca":
        moved: torch.nn.Module = teacher
        moved.to("cuda" if torch.cuda.is_available() else "cpu")
        if flags.task_name is not None or flags.train_file is not None:
            examples = text_sample(flags.teacher, _data(flags), num_examples=flags.num_examples, seed=flags.seed)
    student = student_from_teacher(
        teacher,
        layers_to_keep=kept,
        num_hidden_layers=flags.num_hidden_layers,
        hidden_size=flags.hidden_size,
        num_attention_heads=flags.num_attention_heads,
        intermediate_size=flags.intermediate_size,
        init=flags.init,
        examples=examples,
        seed=flags.seed,
    )
    task = without_task(teacher)
    if task is not None:
        print(
            f"hf-compress: warning: {flags.teacher} is a {task}: it was not fine-tuned on a task, and has none to teach. "
            "Fine-tune it first and make the student of that, unless you distil a language model.",
            file=sys.stderr,
        )
    processor = save_student(student, flags.output_dir, flags.teacher)
    recorded = recorded_drop(student.config)
    warm = recorded_warm_start(student.config)
    if warm is not None:
        print(describe_warm_start(warm))
        delattr(student, ATTRIBUTE)  # written by now, and no part of the student's size
    elif recorded is None:
        print("random weights: the student knows nothing yet, whatever the teacher knows")
    for name, stack in (recorded or {}).items():
        where = "" if name == "layers" else f"{name}: "
        print(f"{where}kept {describe_layers(stack.kept)} of {stack.num_layers}, dropped {describe_layers(stack.dropped)}")
    write_student_card(flags.output_dir, student, teacher, flags.teacher)
    print(size_table(teacher, student, names=("teacher", "student")))
    print(f"\n{flags.output_dir}: {type(student).__name__}, {processor or 'no tokenizer was found beside the teacher'}")
    return 0


def _check_texts(flags: argparse.Namespace) -> None:
    """Refuse, before torch is loaded, texts for nothing, and none where they are needed."""
    given = [f"--{name}" for name in ("task_name", "train_file") if getattr(flags, name) is not None]
    if flags.init == "random" and given:
        raise ArgumentError(
            f"{given[0]} names texts for --init pca to be fitted on, and --init is random. Add --init pca, or leave it out."
        )
    if len(given) == 2:
        raise ArgumentError("--task_name and --train_file both say where the texts come from; give one of them.")
    for name in ("num_examples", "max_seq_length"):
        if getattr(flags, name) < 1:
            raise ArgumentError(f"--{name} is {getattr(flags, name)}; expected at least 1.")


def _data(flags: argparse.Namespace) -> DataArguments:
    """Where the texts are, as run_glue.py is told."""
    from hf_compress.scripts.run_glue import DataArguments

    try:
        return DataArguments(
            task_name=flags.task_name, train_file=flags.train_file, max_seq_length=flags.max_seq_length, pad_to_max_length=False
        )
    except ValueError as error:
        raise ArgumentError(str(error)) from error


def _of_general_tinybert(flags: argparse.Namespace) -> int:
    """A General TinyBERT checkpoint is a student already: it is written as transformers knows models, its projection beside it."""
    from hf_compress.students.tinybert import read_general_tinybert

    shape = ("layers_to_keep", "num_hidden_layers", "hidden_size", "num_attention_heads", "intermediate_size")
    given = [f"--{name}" for name in shape if getattr(flags, name) is not None] + (["--init"] if flags.init != "random" else [])
    if given:
        raise ArgumentError(
            f"{flags.teacher} is a General TinyBERT, a student as it is: {', '.join(given)} would change it. Leave them out."
        )
    found = read_general_tinybert(flags.teacher)
    found.save(flags.output_dir)
    config, (wide, narrow) = found.model.config, found.projections[0][0].shape
    print(f"General TinyBERT: {config.num_hidden_layers} layers x {config.hidden_size}, {config.num_attention_heads} heads, its vocabulary")
    several = len(found.projections)
    which = "projection" if several == 1 else f"{several} projections, one for each layer and the embeddings,"
    print(f"{which} {narrow} -> {wide}: where a distilling run starts; the head of its pre-training is left out")
    if several > 1:
        print("losses that take one for each layer: HiddenStatesLoss(projection='per_layer') and EmbeddingsLoss(projection='per_layer')")
    print(f"\n{flags.output_dir}: {type(found.model).__name__}, {type(found.tokenizer).__name__}")
    return 0
