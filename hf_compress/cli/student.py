"""`hf-compress student TEACHER -o DIR`: a student on disk, ready for a script's `--model_name_or_path`."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from hf_compress.argument_values import layer_numbers
from hf_compress.cli.flags import FlagParser


def main(argv: Sequence[str]) -> int:
    """Make a student, write it with the teacher's tokenizer, and print how large both are; returns the exit code."""
    parser = FlagParser("student", "Make a student: of the teacher's own layers, or of its design at another width with random weights.")
    parser.add_argument("teacher", metavar="TEACHER", help="A folder, or the name of a model on the Hub.")
    parser.flag("output_dir", "-o", required=True, metavar="DIR", help="Where the student goes.")
    parser.flag("layers_to_keep", metavar="LAYERS", help="The teacher's layers to keep, counted from 1: 1,4,8,12 or 1-4.")
    parser.flag("num_hidden_layers", type=int, metavar="N", help="How many layers; without another width, spread over the teacher's.")
    parser.flag("hidden_size", type=int, metavar="N", help="Another width; the weights are then random.")
    parser.flag("num_attention_heads", type=int, metavar="N", help="By default the teacher's number.")
    parser.flag("intermediate_size", type=int, metavar="N", help="Feed-forward size; by default in the teacher's ratio to the width.")
    parser.flag("seed", type=int, metavar="N", default=42, help="For random weights; by default 42.")
    flags = parser.parse(argv)
    kept = None if flags.layers_to_keep is None else layer_numbers(flags.layers_to_keep, flag="layers_to_keep")

    # From here on with torch and transformers, which the help need not wait for.
    from hf_compress.cli.sizes import size_table
    from hf_compress.layers.record import recorded_drop
    from hf_compress.layers.strategies import describe_layers
    from hf_compress.students.from_teacher import load_teacher, student_from_teacher, without_task
    from hf_compress.students.save import check_output_dir, save_student

    check_output_dir(flags.output_dir, flags.teacher)
    teacher = load_teacher(flags.teacher)
    student = student_from_teacher(
        teacher,
        layers_to_keep=kept,
        num_hidden_layers=flags.num_hidden_layers,
        hidden_size=flags.hidden_size,
        num_attention_heads=flags.num_attention_heads,
        intermediate_size=flags.intermediate_size,
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
    if recorded is None:
        print("random weights: the student knows nothing yet, whatever the teacher knows")
    for name, stack in (recorded or {}).items():
        where = "" if name == "layers" else f"{name}: "
        print(f"{where}kept {describe_layers(stack.kept)} of {stack.num_layers}, dropped {describe_layers(stack.dropped)}")
    print(size_table(teacher, student, names=("teacher", "student")))
    print(f"\n{flags.output_dir}: {type(student).__name__}, {processor or 'no tokenizer was found beside the teacher'}")
    return 0
