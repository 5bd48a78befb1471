"""`hf-compress cache info | verify | estimate | view | push`: the teacher on disk, without a teacher."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hf_compress import __version__
from hf_compress.argument_values import nearest_name
from hf_compress.arguments import FIELDS, CompressionArguments
from hf_compress.cache.hub_address import is_hub_address
from hf_compress.cache_arguments import ALIASES
from hf_compress.cli import cache_push
from hf_compress.cli.flags import FlagParser
from hf_compress.errors import ArgumentError, CacheError

if TYPE_CHECKING:
    from hf_compress.cache.copy_view import View
    from hf_compress.cache.manifest import Manifest
    from hf_compress.cache.predictions import TopK
    from hf_compress.losses.loss import Loss

DAMAGED = 1
_COMMANDS = {
    "info": "what a cache holds, of which teacher, and how to train from it",
    "verify": "read every byte of a cache, and say whether it is whole",
    "estimate": "what a cache would take on disk; needs only the teacher's config",
    "view": "write a smaller cache from a larger one, without the teacher",
    "push": cache_push.PURPOSE,
}
_SELECTING = ("hidden_states_selection", "hsk_layers", "hsk_length", "hsk_rank_by", "hsk_width", "hsk_mask")
_RECIPE = ("distill_recipe", "distill_weights", "distill_layer_map")
# Where a flag of a run means something else here.
_HELP = {
    "teacher_cache_dir": "The folder where it would go, to tell how much is free there.",
    "teacher_cache_budget": "How large the smaller one may be, as in 20MB: what it keeps is chosen by what is lost. In place of --hsk.",
    "teacher_cache_logits_top_k": "Of a language model: how many of each token's logits, the largest, as in 64.",
    "hidden_states_selection": "How much of the hidden states: layers, tokens, share of the dimensions, as in 1l_10t_0.1h.",
}
_ALIAS_OF = {name: alias for alias, name in ALIASES.items()}


def main(argv: Sequence[str]) -> int:
    """Run one of them; returns the exit code: 0, and 1 where `verify` finds damage."""
    if not argv or argv[0] in ("-h", "--help"):
        lines = [f"  {name:<10}{purpose}" for name, purpose in _COMMANDS.items()]
        print("\n".join(["usage: hf-compress cache COMMAND ...", "", "The teacher on disk.", "", *lines]))
        print("\n`hf-compress cache COMMAND --help` shows a command's flags.")
        return 0 if argv else 2
    commands: dict[str, Callable[[Sequence[str]], int]] = {"info": info, "verify": verify, "estimate": estimate, "view": view}
    commands["push"] = cache_push.main
    if argv[0] not in commands:
        raise ArgumentError(f"There is no command 'cache {argv[0]}'.{nearest_name(argv[0], commands)} There are {', '.join(commands)}.")
    return commands[argv[0]](argv[1:])


# --- info ---


def info(argv: Sequence[str]) -> int:
    """Print a page about a cache, finished or not."""
    parser = FlagParser("cache info", _COMMANDS["info"].capitalize() + ".")
    parser.add_argument("folder", metavar="FOLDER", help="The cache; or hf://datasets/USER/NAME, on the Hugging Face hub.")
    parser.flag("json", action="store_true", help="Print JSON, for a program to read.")
    flags = parser.parse(argv)
    on_hub = is_hub_address(flags.folder)
    folder = Path() if on_hub else _folder(flags.folder)

    # From here on with torch, which the help need not wait for.
    from hf_compress.cache.hub import read_manifest
    from hf_compress.cli.cache_page import facts_of, facts_of_finished, page_of

    facts = facts_of_finished(flags.folder, read_manifest(flags.folder)) if on_hub else facts_of(folder)
    print(json.dumps(facts, indent=1) if flags.json else page_of(facts))
    return 0


# --- verify ---


def verify(argv: Sequence[str]) -> int:
    """Read a cache whole; the exit code is 1 if anything is wrong with it."""
    parser = FlagParser("cache verify", _COMMANDS["verify"].capitalize() + ".")
    parser.add_argument("folder", metavar="FOLDER", help="The cache; or hf://datasets/USER/NAME, on the Hugging Face hub.")
    folder = _folder(parser.parse(argv).folder)

    from tqdm.auto import tqdm

    from hf_compress.cache.manifest import Manifest
    from hf_compress.cache.verify import verify as verify_cache

    try:
        total = Manifest.load(folder).bytes
    except CacheError:
        total = 0  # it is among the problems that are found
    with tqdm(total=total, desc="reading", unit="B", unit_scale=True, disable=not total) as bar:
        report = verify_cache(folder, bar.update)
    if not report.problems:
        print(f"whole: {report.examples:,} examples, {_readable(report.bytes)}, {report.seconds:.1f} s")
        return 0
    for problem in report.problems:
        print(problem)
    return DAMAGED


# --- estimate ---


def estimate(argv: Sequence[str]) -> int:
    """Print what a cache would take, beside smaller and larger ones."""
    parser = FlagParser("cache estimate", _COMMANDS["estimate"].capitalize() + ".")
    _flags_of_runs(parser, "teacher_model_name_or_path", required=True)
    parser.flag("num_examples", type=int, required=True, metavar="N", help="How many different examples the training data has.")
    parser.flag("tokens_per_example", type=float, required=True, metavar="M", help="Their mean number of tokens, without padding.")
    parser.flag("num_layers", type=int, metavar="N", help="The student's depth; by default the teacher's, the most there can be.")
    parser.flag("model_name_or_path", metavar="STUDENT", help="The student, in place of --num_layers: its config tells its depth.")
    taken = ("teacher_cache_dir", "teacher_cache_dtype", "teacher_cache_logits_top_k", *_SELECTING, *_RECIPE)
    _flags_of_runs(parser, *taken)
    flags = parser.parse(argv)
    asked = _compression(flags, "teacher_model_name_or_path", *taken)
    if flags.num_examples < 1 or not flags.tokens_per_example > 0:
        raise ArgumentError(f"{flags.num_examples} examples of {flags.tokens_per_example:g} tokens take nothing: give numbers above 0.")
    tokens = math.ceil(flags.tokens_per_example)

    from hf_compress.cli.cache_estimate import Question, estimate_page

    print(estimate_page(Question(asked, flags.num_examples, tokens, flags.num_layers, flags.model_name_or_path)))
    return 0


# --- view ---


def view(argv: Sequence[str]) -> int:
    """Write a smaller cache."""
    parser = FlagParser("cache view", _COMMANDS["view"].capitalize() + ".")
    parser.add_argument("folder", metavar="FOLDER", help="The larger cache.")
    parser.flag("output_dir", "-o", required=True, metavar="SMALL", help="Where the smaller one goes.")
    parser.flag("num_layers", type=int, metavar="N", help="The student's depth, where --hsk_layers needs it to tell layers.")
    parser.flag(
        "teacher_cache_dtype", metavar="FORMAT", help="Number format: float32, float16, bfloat16, int8; by default the larger one's."
    )
    _flags_of_runs(parser, "teacher_cache_budget", "teacher_cache_logits_top_k", *_SELECTING)
    flags = parser.parse(argv)
    asked = _compression(flags, "teacher_cache_dtype", "teacher_cache_budget", "teacher_cache_logits_top_k", *_SELECTING)
    said = asked.selection, asked.teacher_cache_dtype, asked.cache_budget, asked.teacher_cache_logits_top_k
    if not any(value is not None for value in said):
        raise ArgumentError(
            "Say what to keep: --hsk, such as 1l_10t_0.1h, another number format with --teacher_cache_dtype, fewer of a language model's "
            "logits with --teacher_cache_logits_top_k, or how large it may be with --teacher_cache_budget, such as 20MB."
        )
    if asked.cache_budget is not None and asked.teacher_cache_logits_top_k is not None:
        raise ArgumentError("--teacher_cache_budget chooses among hidden states: write the view of fewer logits first, then one of that.")
    folder, smaller = _folder(flags.folder), Path(flags.output_dir)

    from tqdm.auto import tqdm

    from hf_compress.cache.copy_view import View, copy_view
    from hf_compress.cache.manifest import Manifest
    from hf_compress.cache.reader import StoredHow

    larger = Manifest.load(folder)
    stored = StoredHow.of(larger)
    narrowed = View(
        selection=asked.selection or stored.selection,
        version=__version__,
        codec=asked.codec if asked.teacher_cache_dtype is not None else None,
        num_student_layers=flags.num_layers,
        top=_top_of_view(larger, asked.teacher_cache_logits_top_k),
        attention_scores=(asked.selection is None and asked.cache_budget is None) or _needs_attention(larger),
    )
    if asked.cache_budget is not None:
        narrowed = _within_budget(folder, asked.cache_budget, narrowed, larger)
    with tqdm(total=larger.examples, desc="copying", unit="ex") as bar:
        manifest = copy_view(folder, smaller, narrowed, bar.update)
    how = StoredHow.of(manifest)
    print(f"{smaller}: {how.selection.describe()}, {how.codec}")
    before, after = _readable(larger.bytes), _readable(manifest.bytes)
    print(f"{manifest.examples:,} examples, {after}: {manifest.bytes / larger.bytes:.1%} of the {before} of {folder}")
    return 0


def _within_budget(folder: Path, budget: int, view: View, larger: Manifest) -> View:
    """The view that loses least, of those that are as small."""
    from hf_compress.cache.budget_view import choose_view
    from hf_compress.losses.hidden_states import HiddenStatesLoss

    in_parts = all(loss.kind == "mse" for loss in _losses(larger) if isinstance(loss, HiddenStatesLoss))
    choices = choose_view(folder, budget, view.codec, attention_scores=view.attention_scores, in_parts=in_parts)
    print("\n".join(choices.lines()))
    chosen = choices.best.chosen
    return replace(view, selection=chosen.selection, codec=chosen.codec)


def _top_of_view(manifest: Manifest, k: int | None) -> TopK | None:
    """How much of a language model's logits a view has; None for what there is."""
    from hf_compress.cache.predictions import VALUES, TopK
    from hf_compress.cache.shard import ONE_ROW
    from hf_compress.losses.logits import LogitsLoss

    if k is None:
        return None
    stored = TopK.of(manifest.columns)
    if stored is not None:
        return TopK(k, stored.temperatures)
    column = next((column for column in manifest.columns if column.name == VALUES and column.group != ONE_ROW), None)
    if column is None:
        raise CacheError(f"--teacher_cache_logits_top_k {k} is about a language model's logits, and this teacher on disk holds none.")
    temperatures = {float(loss.temperature) for loss in _losses(manifest) if isinstance(loss, LogitsLoss)}
    return TopK.asked_for(k, column.item[0], temperatures)


def _needs_attention(manifest: Manifest) -> bool:
    """Whether a run with a selection of hidden states still compares attention: only a recipe that names it does."""
    if manifest.distillation.get("selected"):
        return True  # it was stored beside a selection
    return any(loss.sees_attention and getattr(loss, "required", True) for loss in _losses(manifest))


def _losses(manifest: Manifest) -> list[Loss]:
    """Those of the flags that a cache was built with."""
    from hf_compress.teacher_side import recipe_of

    return recipe_of(CompressionArguments(), manifest.distillation)


# --- shared by them ---


def _flags_of_runs(parser: FlagParser, *names: str, required: bool = False) -> None:
    """Flags that a training run has too, with their help."""
    for name in names:
        others = [f"--{_ALIAS_OF[name]}"] if name in _ALIAS_OF else []
        text = _HELP.get(name) or str(FIELDS[name].metadata["help"])
        parser.flag(name, *others, required=required, metavar="VALUE", help=text.replace("%", "%%"))


def _compression(flags: Any, *names: str) -> CompressionArguments:
    """The flags, checked as a run checks them; a cache is always meant here."""
    values = {name: getattr(flags, name) for name in names}
    asked = CompressionArguments(**{**values, "teacher_cache_dir": values.get("teacher_cache_dir") or "."})
    asked.teacher_cache_dir = values.get("teacher_cache_dir")
    return asked


def _folder(path: str) -> Path:
    if is_hub_address(path):
        from hf_compress.cache.hub import local_folder

        return local_folder(path)
    folder = Path(path)
    if not folder.is_dir():
        raise CacheError(f"There is no folder {path}. Name the folder of a teacher on disk, one with a manifest.json.")
    return folder


def _readable(size: float) -> str:
    from hf_compress.cache.price import readable

    return readable(size)
