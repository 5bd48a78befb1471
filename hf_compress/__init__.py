"""Layer dropping and distillation for Hugging Face's Trainer: the public names, sorted, and the package's own architectures registered.

A name is imported when it is first used (PEP 562), so `import hf_compress` and `hf-compress --help` wait for neither torch nor
transformers, and `Seq2SeqDistillTrainer` binds transformers' own Seq2SeqTrainer only where it is wanted. transformers learns of the pruned
architectures when it is imported itself.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from hf_compress.registration import register_architectures

if TYPE_CHECKING:
    from hf_compress.adapter_off import AdapterOffTeacher as AdapterOffTeacher
    from hf_compress.arguments import CompressionArguments as CompressionArguments
    from hf_compress.augmentation.augmenter import Augmenter as Augmenter
    from hf_compress.cache.reader import TeacherCache as TeacherCache
    from hf_compress.cache.selection import Depth as Depth
    from hf_compress.cache.selection import Selection as Selection
    from hf_compress.cached_teacher import CachedTeacher as CachedTeacher
    from hf_compress.callbacks import LayerDropCallback as LayerDropCallback
    from hf_compress.deepspeed_configs import deepspeed_config as deepspeed_config
    from hf_compress.errors import ArgumentError as ArgumentError
    from hf_compress.errors import CacheError as CacheError
    from hf_compress.errors import CompressionError as CompressionError
    from hf_compress.errors import DataError as DataError
    from hf_compress.errors import LayerDropError as LayerDropError
    from hf_compress.errors import LayerMapError as LayerMapError
    from hf_compress.errors import LossError as LossError
    from hf_compress.errors import ScriptError as ScriptError
    from hf_compress.errors import TeacherError as TeacherError
    from hf_compress.layers.adapter_base import load_with_adapters as load_with_adapters
    from hf_compress.layers.contribution import measure_contribution as measure_contribution
    from hf_compress.layers.drop import LayerDrop as LayerDrop
    from hf_compress.layers.drop import drop_layers as drop_layers
    from hf_compress.layers.layer_map import LayerMap as LayerMap
    from hf_compress.losses.attention_scores import AttentionScoresLoss as AttentionScoresLoss
    from hf_compress.losses.attention_scores import AttentionsLoss as AttentionsLoss
    from hf_compress.losses.combined_layers import CombinedLayersLoss as CombinedLayersLoss
    from hf_compress.losses.hidden_states import EmbeddingsLoss as EmbeddingsLoss
    from hf_compress.losses.hidden_states import HiddenStatesLoss as HiddenStatesLoss
    from hf_compress.losses.hidden_states import HintLoss as HintLoss
    from hf_compress.losses.labels import LabelsLoss as LabelsLoss
    from hf_compress.losses.logits import LogitsLoss as LogitsLoss
    from hf_compress.losses.mixed_layers import MixedLayersLoss as MixedLayersLoss
    from hf_compress.losses.relations import KeyRelationsLoss as KeyRelationsLoss
    from hf_compress.losses.relations import QueryRelationsLoss as QueryRelationsLoss
    from hf_compress.losses.relations import ValueRelationsLoss as ValueRelationsLoss
    from hf_compress.losses.transported_layers import AttentionScoresTransportLoss as AttentionScoresTransportLoss
    from hf_compress.losses.transported_layers import HiddenStatesTransportLoss as HiddenStatesTransportLoss
    from hf_compress.students.from_teacher import student_from_teacher as student_from_teacher
    from hf_compress.students.prune import prune_student as prune_student
    from hf_compress.students.save import save_student as save_student
    from hf_compress.teacher import LiveTeacher as LiveTeacher
    from hf_compress.trainer import DistillTrainer as DistillTrainer
    from hf_compress.trainer_seq2seq import Seq2SeqDistillTrainer as Seq2SeqDistillTrainer
    from hf_compress.training_arguments import DistillTrainingArguments as DistillTrainingArguments
    from hf_compress.training_arguments import Seq2SeqDistillTrainingArguments as Seq2SeqDistillTrainingArguments

__version__ = "0.1.0"

# Public name -> the module that defines it. Type checkers read the imports above; tests/test_public_names.py holds both to each other.
_MODULES: dict[str, str] = {
    "AdapterOffTeacher": "hf_compress.adapter_off",
    "ArgumentError": "hf_compress.errors",
    "AttentionScoresLoss": "hf_compress.losses.attention_scores",
    "AttentionScoresTransportLoss": "hf_compress.losses.transported_layers",
    "AttentionsLoss": "hf_compress.losses.attention_scores",
    "Augmenter": "hf_compress.augmentation.augmenter",
    "CacheError": "hf_compress.errors",
    "CachedTeacher": "hf_compress.cached_teacher",
    "CombinedLayersLoss": "hf_compress.losses.combined_layers",
    "CompressionArguments": "hf_compress.arguments",
    "CompressionError": "hf_compress.errors",
    "DataError": "hf_compress.errors",
    "Depth": "hf_compress.cache.selection",
    "DistillTrainer": "hf_compress.trainer",
    "DistillTrainingArguments": "hf_compress.training_arguments",
    "EmbeddingsLoss": "hf_compress.losses.hidden_states",
    "HiddenStatesLoss": "hf_compress.losses.hidden_states",
    "HiddenStatesTransportLoss": "hf_compress.losses.transported_layers",
    "HintLoss": "hf_compress.losses.hidden_states",
    "KeyRelationsLoss": "hf_compress.losses.relations",
    "LabelsLoss": "hf_compress.losses.labels",
    "LayerDrop": "hf_compress.layers.drop",
    "LayerDropCallback": "hf_compress.callbacks",
    "LayerDropError": "hf_compress.errors",
    "LayerMap": "hf_compress.layers.layer_map",
    "LayerMapError": "hf_compress.errors",
    "LiveTeacher": "hf_compress.teacher",
    "LogitsLoss": "hf_compress.losses.logits",
    "LossError": "hf_compress.errors",
    "MixedLayersLoss": "hf_compress.losses.mixed_layers",
    "QueryRelationsLoss": "hf_compress.losses.relations",
    "ScriptError": "hf_compress.errors",
    "Selection": "hf_compress.cache.selection",
    "Seq2SeqDistillTrainer": "hf_compress.trainer_seq2seq",
    "Seq2SeqDistillTrainingArguments": "hf_compress.training_arguments",
    "TeacherCache": "hf_compress.cache.reader",
    "TeacherError": "hf_compress.errors",
    "ValueRelationsLoss": "hf_compress.losses.relations",
    "deepspeed_config": "hf_compress.deepspeed_configs",
    "drop_layers": "hf_compress.layers.drop",
    "load_with_adapters": "hf_compress.layers.adapter_base",
    "measure_contribution": "hf_compress.layers.contribution",
    "prune_student": "hf_compress.students.prune",
    "save_student": "hf_compress.students.save",
    "student_from_teacher": "hf_compress.students.from_teacher",
}

__all__ = [*_MODULES, "__version__"]

register_architectures()


def __getattr__(name: str) -> Any:
    """Import the module that defines a public name, when it is first asked for."""
    if name not in _MODULES:
        raise AttributeError(f"module 'hf_compress' has no attribute {name!r}")
    value = getattr(import_module(_MODULES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    """The public names beside what every module has."""
    return sorted({*globals(), *__all__})
