"""What every test stands on: no network, no shared cache, one thread, the same random numbers.

The environment is set before torch and Hugging Face's libraries are imported, because they read it on import; tests that start
processes hand it on.
"""

from __future__ import annotations

import atexit
import os
import shutil
import tempfile

HOME = tempfile.mkdtemp(prefix="hf_compress_tests_")
atexit.register(shutil.rmtree, HOME, ignore_errors=True)
os.environ.update(
    {
        "CUBLAS_WORKSPACE_CONFIG": ":4096:8",
        "HF_DATASETS_OFFLINE": "1",
        "HF_HOME": HOME,
        "HF_HUB_OFFLINE": "1",
        "MPLBACKEND": "Agg",
        "OMP_NUM_THREADS": "1",
        "TOKENIZERS_PARALLELISM": "false",
    }
)
for variable in ("HF_DATASETS_CACHE", "HF_HUB_CACHE", "HF_MODULES_CACHE", "LOCAL_RANK", "RANK", "WORLD_SIZE"):
    os.environ.pop(variable, None)

import gc  # noqa: E402
import random  # noqa: E402

import numpy as np  # noqa: E402
import pytest  # noqa: E402
import torch  # noqa: E402

torch.set_num_threads(1)


@pytest.fixture(autouse=True, scope="session")
def quick_collections() -> None:
    """Each training collects garbage several times, which would look every time at all that was imported."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def same_random_numbers() -> None:
    """Every test begins with the same seeds, whichever ran before it."""
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)
