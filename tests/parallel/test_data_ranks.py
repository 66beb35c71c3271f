from __future__ import annotations

from typing import Any

import pytest
import torch
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy, SingleDeviceStrategy
from ranks import run_on_ranks
from tiny_run import tiny_trainer

from lightllm.parallel import Degrees
from lightllm.parallel.data_ranks import data_rank, num_data_ranks, sampler_arguments, sum_over_data_ranks
from lightllm.parallel.degrees import device_mesh


def test_one_process_takes_all() -> None:
    strategy = SingleDeviceStrategy(torch.device("cpu"))
    assert (data_rank(strategy), num_data_ranks(strategy)) == (0, 1)
    assert sum_over_data_ranks(strategy, torch.tensor(3.0)).item() == 3.0


def of_a_mesh(degrees: Degrees) -> dict[str, int]:
    return sampler_arguments(device_mesh(degrees, "cpu"))


@pytest.mark.parametrize(
    ("degrees", "expected"),
    [
        (Degrees(shard=2, tensor=2), [0, 0, 1, 1]),
        (Degrees(replicate=2, shard=2), [0, 1, 2, 3]),
        (Degrees(replicate=2, shard=1, pipeline=2), [0, 1, 0, 1]),
    ],
)
def test_ranks_of_a_mesh(degrees: Degrees, expected: list[int]) -> None:
    found = run_on_ranks(of_a_mesh, 4, degrees)
    assert [one["rank"] for one in found] == expected
    assert {one["num_replicas"] for one in found} == {max(expected) + 1}


def of_a_strategy(folder: Any, strategy: Any) -> tuple[int, int, float]:
    trainer = tiny_trainer(folder, [], devices=4, strategy=strategy)
    strategy = trainer.strategy
    if isinstance(strategy, ModelParallelStrategy):
        strategy.connect(torch.nn.Identity())  # type: ignore[arg-type]  # which is told of the mesh
    strategy.setup_environment()
    rank = data_rank(strategy)
    total = sum_over_data_ranks(strategy, torch.tensor(10.0**rank))
    return rank, num_data_ranks(strategy), total.item()


def test_ranks_of_a_strategy(tmp_path: Any) -> None:
    strategy = ModelParallelStrategy(data_parallel_size=2, tensor_parallel_size=2)
    assert run_on_ranks(of_a_strategy, 4, tmp_path, strategy) == [(0, 2, 11.0)] * 2 + [(1, 2, 11.0)] * 2
    assert run_on_ranks(of_a_strategy, 4, tmp_path, DDPStrategy()) == [(rank, 4, 1111.0) for rank in range(4)]
