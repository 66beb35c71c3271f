"""A run in a pipeline is the run of one process: weights, losses, validation and checkpoints."""

from __future__ import annotations

from pathlib import Path

import pytest
from staged_run import Reference, compare_with_one_process

from lightllm.models import Adapter, Frozen, LoRA


@pytest.mark.parametrize("schedule", ["gpipe", "1f1b", "interleaved_1f1b", "looped_bfs", "zero_bubble", "zbv"])
def test_two_ranks_are_one_process(tmp_path: Path, one_process: Reference, schedule: str) -> None:
    compare_with_one_process(tmp_path, one_process, 2, {"pipeline": 2, "microbatches": 4, "schedule": schedule})


@pytest.mark.parametrize("schedule", ["gpipe", "1f1b"])
def test_four_stages_are_one_process(tmp_path: Path, one_process: Reference, schedule: str) -> None:
    compare_with_one_process(tmp_path, one_process, 4, {"pipeline": 4, "microbatches": 4, "schedule": schedule})


@pytest.mark.parametrize("schedule", ["interleaved_1f1b", "looped_bfs", "zero_bubble", "zbv"])
def test_four_ranks_of_two_stages_each(tmp_path: Path, one_process: Reference, schedule: str) -> None:
    compare_with_one_process(
        tmp_path, one_process, 4, {"pipeline": 4, "microbatches": 4, "schedule": schedule}, "deep", tied=False, layers=8
    )


@pytest.mark.parametrize("schedule", ["1f1b", "zero_bubble"])
def test_an_adapter_trains_in_stages(tmp_path: Path, one_process: Reference, schedule: str) -> None:
    strategy = {"pipeline": 2, "microbatches": 4, "schedule": schedule}
    compare_with_one_process(tmp_path, one_process, 2, strategy, "lora", adapter=LoRA(rank=4))


def test_a_stage_of_which_nothing_trains(tmp_path: Path, one_process: Reference) -> None:
    strategy = {"pipeline": 2, "microbatches": 4, "cut": [2, 2]}
    compare_with_one_process(tmp_path, one_process, 2, strategy, "frozen", tied=False, adapter=Frozen(num_blocks=2))


@pytest.mark.parametrize("adapter", [None, LoRA(rank=4)])
def test_pipelines_beside_each_other(tmp_path: Path, one_process: Reference, adapter: Adapter | None) -> None:
    name = "full" if adapter is None else "lora"
    fields = {} if adapter is None else {"adapter": adapter}
    compare_with_one_process(tmp_path, one_process, 4, {"pipeline": 2, "microbatches": 3}, name, **fields)
