"""`hf-compress drop MODEL -o DIR`: the model without some of its layers, on disk."""

from __future__ import annotations

import copy
from collections.abc import Sequence

from hf_compress.arguments import CompressionArguments
from hf_compress.cli.flags import FlagParser
from hf_compress.errors import ArgumentError


def main(argv: Sequence[str]) -> int:
    """Drop layers, write the model with its tokenizer, and print what was kept; returns the exit code."""
    parser = FlagParser("drop", "Drop layers of a model, by a strategy or by number. What is kept keeps its weights.")
    parser.add_argument("model", metavar="MODEL", help="A folder, or the name of a model on the Hub.")
    parser.flag("output_dir", "-o", required=True, metavar="DIR", help="Where the smaller model goes.")
    parser.flag(
        "layer_drop_strategy", "--strategy", metavar="NAME", help="Which layers to drop: top, bottom, symmetric, alternate, alternate_odd."
    )
    parser.flag("num_layers_to_drop", metavar="N", help="How many; by default a third, at least one.")
    parser.flag("layers_to_drop", metavar="LAYERS", help="The layers to drop instead, counted from 1: 5-8 or 5,6,7,8.")
    parser.flag("layers_to_keep", metavar="LAYERS", help="The layers to keep instead, counted from 1.")
    parser.flag("layer_drop_stack", "--stack", metavar="NAME", help="Of an encoder-decoder model: encoder, decoder or both.")
    flags = vars(parser.parse(argv))
    source, output_dir = flags.pop("model"), flags.pop("output_dir")
    flags.pop("traceback")
    request = CompressionArguments(**flags)
    if request.strategy == "contribution":
        raise ArgumentError(
            "The contribution strategy measures layers on examples, which this command has not; use `hf-compress run SCRIPT "
            "--layer_drop_strategy contribution`, or drop_layers(model, strategy='contribution', batches=...) in Python."
        )
    if not request.wants_layer_drop:
        raise ArgumentError("Say which layers to drop: --strategy, --layers_to_drop or --layers_to_keep.")

    # From here on with torch and transformers, which the help need not wait for.
    from hf_compress.card.facts import write_student_card
    from hf_compress.cli.sizes import size_table
    from hf_compress.layers.drop import drop_layers
    from hf_compress.students.from_teacher import load_teacher
    from hf_compress.students.save import check_output_dir, save_student

    check_output_dir(output_dir, source, what="model")
    model = load_teacher(source)
    smaller = copy.deepcopy(model)
    dropped = drop_layers(
        smaller,
        strategy=request.strategy,
        num_layers_to_drop=request.num_layers_to_drop,
        layers_to_drop=request.dropped,
        layers_to_keep=request.kept,
        stack=request.stack,
    )
    processor = save_student(smaller, output_dir, source)
    write_student_card(output_dir, smaller, model, source)
    print(dropped)
    print(size_table(model, smaller, names=("before", "after")))
    print(f"\n{output_dir}: {type(smaller).__name__}, {processor or 'no tokenizer was found beside the model'}")
    return 0
