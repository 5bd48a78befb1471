"""SST-2 of a few sentences and few words, in the folders where `load_dataset` and `evaluate.load` look before they ask the hub."""

from __future__ import annotations

from pathlib import Path

from datasets import ClassLabel, Dataset, Features, Value

from tests.tiny_text import labelled

FEATURES = Features({"sentence": Value("string"), "label": ClassLabel(names=["bad", "good"]), "idx": Value("int32")})
# Not a score of GLUE: what is shown is that the task's own is asked for.
METRIC = """
import datasets
import evaluate


class Glue(evaluate.Metric):
    def _info(self):
        features = datasets.Features({"predictions": datasets.Value("int64"), "references": datasets.Value("int64")})
        return evaluate.MetricInfo(description="", citation="", features=features)

    def _compute(self, predictions, references):
        return {f"right_in_{self.config_name}": sum(map(lambda pair: pair[0] == pair[1], zip(predictions, references)))}
"""


def split(count: int, seed: int) -> Dataset:
    rows = [{"sentence": text, "label": label, "idx": number} for number, (text, label) in enumerate(labelled(count, seed=seed))]
    return Dataset.from_list(rows, features=FEATURES)


def write_glue(folder: Path) -> None:
    """16 sentences a split; to be read from that folder as the working directory."""
    data = folder / "nyu-mll" / "glue"
    (data / "sst2").mkdir(parents=True)
    for name, seed in (("train", 1), ("validation", 2), ("test", 3)):
        split(16, seed).to_parquet(data / "sst2" / f"{name}-0.parquet")
    paths = "\n".join(f"  - split: {name}\n    path: sst2/{name}-*" for name in ("train", "validation", "test"))
    (data / "README.md").write_text(f"---\nconfigs:\n- config_name: sst2\n  data_files:\n{paths}\n---\n")
    (folder / "glue").mkdir()
    (folder / "glue" / "glue.py").write_text(METRIC)
