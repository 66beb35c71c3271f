"""A run in a pipeline is the run of one process: weights, losses, validation and checkpoints."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import run_on_ranks
from staged_run import assert_same_weights, global_batches, module, read, train

from lightllm.batch import TextBatch
from lightllm.models import Adapter, Frozen, LoRA
from lightllm.parallel import PipelineParallelStrategy

Strategy = dict[str, Any]
Reference = Callable[..., tuple[dict[str, Any], dict[str, Any]]]


@pytest.fixture(scope="module")
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


def fit(folder: Path, strategy: Strategy, fields: dict[str, Any], batches: list[TextBatch], **run: Any) -> Any:
    """A run on one of several ranks."""
    run = {"strategy": PipelineParallelStrategy(**strategy), "devices": torch.distributed.get_world_size()} | run
    return train(module(**fields), batches, folder, **run)


def compare(
    folder: Path, one_process: Reference, world_size: int, strategy: Strategy, name: str = "full", **fields: Any
) -> None:
    """Train in a pipeline and in one process, on the same batches of every optimizer step."""
    data_ranks = world_size // strategy["pipeline"]
    expected, whole = one_process(name, fields, data_ranks)
    for rank in run_on_ranks(fit, world_size, folder, strategy, fields, global_batches(data_ranks), seconds=150):
        assert rank["losses"] == pytest.approx(expected["losses"], rel=1e-5)
        assert rank["validation"] == pytest.approx(expected["validation"], rel=1e-5)
    ours = read(folder)
    assert_same_weights(ours["state_dict"], whole["state_dict"])
    for mine, theirs in zip(ours["optimizer_states"], whole["optimizer_states"], strict=True):
        assert mine["param_groups"] == theirs["param_groups"]
        assert_same_weights(moments(mine), moments(theirs))


def moments(state: dict[str, Any]) -> dict[str, torch.Tensor]:
    return {f"{index} {key}": value for index, of in state["state"].items() for key, value in of.items()}


@pytest.mark.parametrize("schedule", ["gpipe", "1f1b", "interleaved_1f1b", "looped_bfs", "zero_bubble", "zbv"])
def test_two_ranks_are_one_process(tmp_path: Path, one_process: Reference, schedule: str) -> None:
    compare(tmp_path, one_process, 2, {"pipeline": 2, "microbatches": 4, "schedule": schedule})


@pytest.mark.parametrize("schedule", ["gpipe", "1f1b"])
def test_four_stages_are_one_process(tmp_path: Path, one_process: Reference, schedule: str) -> None:
    compare(tmp_path, one_process, 4, {"pipeline": 4, "microbatches": 4, "schedule": schedule})


@pytest.mark.parametrize("schedule", ["interleaved_1f1b", "looped_bfs", "zero_bubble", "zbv"])
def test_four_ranks_of_two_stages_each(tmp_path: Path, one_process: Reference, schedule: str) -> None:
    compare(
        tmp_path, one_process, 4, {"pipeline": 4, "microbatches": 4, "schedule": schedule}, "deep", tied=False, layers=8
    )


@pytest.mark.parametrize("schedule", ["1f1b", "zero_bubble"])
def test_an_adapter_trains_in_stages(tmp_path: Path, one_process: Reference, schedule: str) -> None:
    strategy = {"pipeline": 2, "microbatches": 4, "schedule": schedule}
    compare(tmp_path, one_process, 2, strategy, "lora", adapter=LoRA(rank=4))


def test_a_stage_of_which_nothing_trains(tmp_path: Path, one_process: Reference) -> None:
    strategy = {"pipeline": 2, "microbatches": 4, "cut": [2, 2]}
    compare(tmp_path, one_process, 2, strategy, "frozen", tied=False, adapter=Frozen(num_blocks=2))


@pytest.mark.parametrize("adapter", [None, LoRA(rank=4)])
def test_pipelines_beside_each_other(tmp_path: Path, one_process: Reference, adapter: Adapter | None) -> None:
    name = "full" if adapter is None else "lora"
    fields = {} if adapter is None else {"adapter": adapter}
    compare(tmp_path, one_process, 4, {"pipeline": 2, "microbatches": 3}, name, **fields)
