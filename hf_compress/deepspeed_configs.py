"""DeepSpeed's configs by name, and what a config of one's own may not hold any more. Neither torch nor DeepSpeed here.

    --deepspeed zero2                 hf_compress/deepspeed/zero2.json         named_config
    TrainingArguments(deepspeed=...)  deepspeed_config("zero2"), a dict
    --deepspeed own.json              read, and refused where it holds a key that DeepSpeed has removed

The named configs say only what the Trainer's flags do not: batch sizes, accumulation, clipping and number formats are "auto", and they have
no optimizer and no schedule, so `--optim`, `--weight_decay` and `--lr_scheduler_type` mean what they mean without DeepSpeed. Offloaded
optimizers are torch's own too, else accelerate would put DeepSpeedCPUAdam in the place of whatever `--optim` asks for. The same files serve
on a machine without a GPU. Under ZeRO-3 the model is gathered when it is saved, so a student is written whole.
"""

from __future__ import annotations

import base64
import binascii
import json
import os
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal, get_args

from hf_compress.argument_values import nearest_name
from hf_compress.errors import ArgumentError

ConfigName = Literal["zero1", "zero2", "zero3", "zero2_offload", "zero3_offload"]
CONFIG_NAMES: tuple[str, ...] = get_args(ConfigName)
FOLDER = Path(__file__).parent / "deepspeed"
# One of these is what launchers say to a process, and MPI's and the clouds' to theirs.
LAUNCHED = ("RANK", "OMPI_COMM_WORLD_RANK", "PMI_RANK", "AZUREML_EXPERIMENT_ID", "SM_CURRENT_HOST")
# Where `accelerate launch --deepspeed_config_file` leaves the file's name.
ACCELERATE_VARIABLE = "ACCELERATE_DEEPSPEED_CONFIG_FILE"

_NOTHING = "nothing takes its place"
# Keys that DeepSpeed 0.19.8 refuses -> what there is instead.
REMOVED: dict[str, str] = {
    "amp": 'mixed precision is "bf16": {"enabled": "auto"} or "fp16": {"enabled": "auto"} in the file, and --bf16 or --fp16',
    "compression_training": "",  # see _instead_of_compression
    "curriculum_learning": "DeepSpeed has it as data_efficiency.data_sampling.curriculum_learning",
    "eigenvalue": _NOTHING,
    "elasticity": "batch sizes are --per_device_train_batch_size and --gradient_accumulation_steps",
    "graph_harvesting": _NOTHING,
    "nebula": "checkpoints are written by torch",
    "progressive_layer_drop": "--layer_drop_strategy drops layers before the training, and for good",
    "quantize_training": _NOTHING,
    "sparse_attention": "attention is the model's own",
    "sparse_gradients": "an embedding made with sparse=True needs no key",
    "zero_optimization.mics_hierarchical_params_gather": "zero_optimization.zero_hpz_partition_size gathers within a node",
    "zero_optimization.mics_shard_size": "zero_optimization.zero_hpz_partition_size gathers within a node",
    "zero_optimization.zeropp_loco_param": "quantized gradients do without it",
}


def deepspeed_config(name: ConfigName) -> dict[str, Any]:
    """A named config as a dict, to be changed or handed on: `TrainingArguments(deepspeed=deepspeed_config("zero2"))`.

    Args:
        name: "zero1", "zero2", "zero3", "zero2_offload" or "zero3_offload".

    Raises:
        ArgumentError: no such name.
    """
    if name not in CONFIG_NAMES:
        raise ArgumentError(
            f"There is no DeepSpeed config '{name}'.{nearest_name(str(name), CONFIG_NAMES)} Known: {', '.join(CONFIG_NAMES)}."
        )
    config: dict[str, Any] = json.loads((FOLDER / f"{name}.json").read_text(encoding="utf-8"))
    return config


def check_launched(value: Any) -> None:
    """See that a launcher has started this process, where DeepSpeed is to join it with others.

    Args:
        value: as for `named_config`; None where DeepSpeed is not asked for.

    Raises:
        ArgumentError: nobody has said which of how many processes this is.
    """
    if value and not any(name in os.environ for name in LAUNCHED) and find_spec("mpi4py") is None:
        raise ArgumentError(
            "--deepspeed needs a launcher, which tells each process which of how many it is; one process on one GPU as well: deepspeed "
            "--num_gpus 1 --module hf_compress.run SCRIPT ..., or torchrun --standalone --nproc_per_node 1 -m hf_compress.run SCRIPT ... "
            "(without a GPU: deepspeed --num_accelerators 1 ... --use_cpu)."
        )


def named_config(value: Any, *, flag: str = "deepspeed") -> Any:
    """What `--deepspeed` holds, as transformers takes it: a name becomes the path of its file, all else stays as it is.

    Args:
        value: a name, a path, JSON as text, text in base64, a dict, or None; of a file "./zero2" if it is called like a config of ours.
        flag: the flag that said it, for messages.

    Raises:
        ArgumentError: no such name or file, or a config that holds a key that DeepSpeed has removed.
    """
    if isinstance(value, str) and value in CONFIG_NAMES:
        return str(FOLDER / f"{value}.json")
    if isinstance(value, Mapping):
        refuse_removed_keys(value, source=f"The config of --{flag}")
    elif isinstance(value, str) and value:
        refuse_removed_keys(_read(value, flag), source=f"--{flag} {value if len(value) < 200 else 'as it is given'}")
    return value


def with_named_config(arguments: Sequence[str]) -> tuple[str, ...]:
    """A script's arguments, with the name after `--deepspeed` turned into a path.

    Raises:
        ArgumentError: see `named_config`.
    """
    changed: list[str] = []
    for argument in arguments:
        before = changed[-1] if changed else ""
        if before == "--deepspeed" and not argument.startswith("-"):
            argument = named_config(argument)
        elif argument.startswith("--deepspeed="):
            argument = f"--deepspeed={named_config(argument.partition('=')[2])}"
        changed.append(argument)
    return tuple(changed)


def refuse_removed_keys(config: Mapping[str, Any], *, source: str) -> None:
    """See that a config holds no key that DeepSpeed has removed.

    Args:
        config: the whole config.
        source: what to call it.

    Raises:
        ArgumentError: naming each key, and what there is instead.
    """
    zero = config.get("zero_optimization")
    held = {*config, *(f"zero_optimization.{key}" for key in (zero if isinstance(zero, Mapping) else ()))}
    found = [key for key in REMOVED if key in held]
    if not found:
        return
    listed = ". ".join(f"{key}: {_instead_of_compression(config[key]) if key == 'compression_training' else REMOVED[key]}" for key in found)
    which, them = ("keys", "them") if len(found) > 1 else ("a key", "it")
    raise ArgumentError(f"{source} holds {which} that DeepSpeed has removed and refuses ({', '.join(found)}); take {them} out. {listed}.")


def _instead_of_compression(settings: Any) -> str:
    """What of DeepSpeed's compression library hf_compress has, in the words of its flags."""
    reduction = settings.get("layer_reduction") if isinstance(settings, Mapping) else None
    others = [key for key in settings if key != "layer_reduction"] if isinstance(settings, Mapping) else []
    parts = []
    if isinstance(reduction, Mapping) and reduction.get("enabled", True):
        parts.append(_instead_of_layer_reduction(reduction))
    if any(key in ("head_pruning", "row_pruning") for key in others):
        parts.append("heads and feed-forward rows are cut by `hf-compress prune TEACHER -o DIR`")
    if any("quantization" in key for key in others):
        parts.append("nothing here quantizes; that is for the finished student")
    return "; ".join(parts) or _NOTHING


def _instead_of_layer_reduction(reduction: Mapping[str, Any]) -> str:
    """The line of flags for `layer_reduction`, whose layers count from 0."""
    number, layers, prefix = (reduction.get(key) for key in ("keep_number_layer", "teacher_layer", "module_name_prefix"))
    stack = next((side for side in ("encoder", "decoder") if str(prefix).removeprefix("model.").startswith(f"{side}.")), None)
    of_stack = f" (with --layer_drop_stack {stack} where the model has an encoder and a decoder)" if stack else ""
    if isinstance(layers, list) and layers and all(isinstance(layer, int) and layer >= 0 for layer in layers):
        kept = sorted({layer + 1 for layer in layers})
        order = "" if [layer + 1 for layer in layers] == kept else ", in the teacher's order and each once"
        said = f"teacher_layer {','.join(map(str, layers))}"
        return (
            f"for layer_reduction give --model_name_or_path the teacher and add --layers_to_keep {','.join(map(str, kept))}{of_stack}: "
            f"layers are counted from 1 here{order}, and {said} counts from 0"
        )
    count = f"--num_hidden_layers {number}" if isinstance(number, int) else "--num_hidden_layers N"
    return (
        f"for layer_reduction without teacher_layer make the student first, by `hf-compress student TEACHER -o DIR {count}`, and train that"
    )


def _read(value: str, flag: str) -> Mapping[str, Any]:
    """A config from a file, from JSON as text, or from base64, as accelerate reads it."""
    file = Path(value)
    try:
        is_file = file.is_file()
    except OSError:  # a text too long for a path
        is_file = False
    try:
        if is_file:
            text = file.read_text(encoding="utf-8")
        elif value.lstrip().startswith("{"):
            text = value
        else:
            text = base64.urlsafe_b64decode(value).decode("utf-8")
            json.loads(text)
    except (binascii.Error, ValueError):
        if is_file:
            raise ArgumentError(f"--{flag} {value} is no text in UTF-8; expected a DeepSpeed config in JSON.") from None
        raise ArgumentError(
            f"--{flag} {value}: there is no such file, and no config of that name.{nearest_name(value, CONFIG_NAMES)} "
            f"Known: {', '.join(CONFIG_NAMES)}, or the path of a config of your own."
        ) from None
    except OSError as error:
        raise ArgumentError(f"--{flag}: cannot read {value} ({error.strerror}).") from error
    try:
        content = json.loads(text)
    except json.JSONDecodeError as error:
        raise ArgumentError(f"--{flag}: {value} cannot be read: {error}.") from error
    if not isinstance(content, dict):
        raise ArgumentError(f"--{flag}: {value} holds a {type(content).__name__}; expected a DeepSpeed config.")
    return content
