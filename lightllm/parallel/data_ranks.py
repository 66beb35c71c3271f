"""Which ranks see which batches. Those of one tensor-parallel group, or of one pipeline, see the same ones."""

from __future__ import annotations

from lightning.pytorch.strategies import ParallelStrategy, Strategy
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from lightllm.parallel.degrees import DATA_AXES


def num_data_ranks(strategy: Strategy) -> int:
    """How many different batches there are at a time."""
    return _sampler_arguments(strategy)["num_replicas"]


def data_rank(strategy: Strategy) -> int:
    """Whose of them this process takes."""
    return _sampler_arguments(strategy)["rank"]


def sum_over_data_ranks(strategy: Strategy, tensor: Tensor) -> Tensor:
    """Add up what each data rank has counted once, though several ranks may have seen the same batch.

    Every rank must call it, and those of one data rank with the same numbers.
    """
    if not isinstance(strategy, ParallelStrategy) or strategy.world_size == 1:
        return tensor
    total = strategy.reduce(tensor, reduce_op="sum")
    return total * (num_data_ranks(strategy) / strategy.world_size)


def sampler_arguments(mesh: DeviceMesh) -> dict[str, int]:
    """What a `DistributedSampler` takes on a rank of a mesh of `degrees.AXES`: for a strategy's own method."""
    rank, count = 0, 1
    for axis in DATA_AXES:
        size = mesh[axis].size()
        rank, count = rank * size + mesh.get_local_rank(axis), count * size
    return {"num_replicas": count, "rank": rank}


def _sampler_arguments(strategy: Strategy) -> dict[str, int]:
    """By Lightning's own interface, which every strategy has that spreads batches."""
    if not isinstance(strategy, ParallelStrategy):
        return {"num_replicas": 1, "rank": 0}
    arguments: dict[str, int] = strategy.distributed_sampler_kwargs
    return arguments
