"""Runs of one process, with which those of many are compared."""

from __future__ import annotations

from typing import Any

import pytest
from staged_run import Reference, global_batches, module, read, train


@pytest.fixture(scope="session")
def one_process(tmp_path_factory: pytest.TempPathFactory) -> Reference:
    """Makes runs of one process, each once: what came of it, and its checkpoint."""
    made: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {}

    def run(name: str, fields: dict[str, Any], data_ranks: int) -> tuple[dict[str, Any], dict[str, Any]]:
        key = f"{name}-{data_ranks}"
        if key not in made:
            folder = tmp_path_factory.mktemp("one")
            found = train(module(**fields), global_batches(data_ranks), folder, accumulate=2 * data_ranks)
            made[key] = found, read(folder)
        return made[key]

    return run
