"""Pipelines whose stages share matrices or weights with further ranks: still the run of one process."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import run_on_ranks
from staged_run import Reference, compare_with_one_process
from tiny_networks import tiny_llama
from torch import Tensor
from torch.distributed.tensor import DTensor

from lightllm.models import LoRA
from lightllm.parallel.degrees import Degrees, device_mesh
from lightllm.parallel.layout import find_layout
from lightllm.parallel.schedules import make_plan
from lightllm.parallel.spread_stages import spread_stages
from lightllm.parallel.staged_network import StagedNetwork

TENSOR = {"pipeline": 2, "microbatches": 4, "tensor": 2}
SHARD = {"pipeline": 2, "microbatches": 4, "shard": 2}


@pytest.mark.parametrize("schedule", ["1f1b", "zero_bubble"])
@pytest.mark.parametrize("strategy", [TENSOR, SHARD], ids=["tensor", "shard"])
def test_stages_that_ranks_share(
    tmp_path: Path, one_process: Reference, strategy: dict[str, Any], schedule: str
) -> None:
    compare_with_one_process(tmp_path, one_process, 4, {**strategy, "schedule": schedule})


@pytest.mark.parametrize("strategy", [TENSOR, SHARD], ids=["tensor", "shard"])
def test_adapters_of_shared_stages(tmp_path: Path, one_process: Reference, strategy: dict[str, Any]) -> None:
    compare_with_one_process(tmp_path, one_process, 4, strategy, "lora", adapter=LoRA(rank=4))


def test_stages_tensors_and_data_at_once(tmp_path: Path, one_process: Reference) -> None:
    compare_with_one_process(tmp_path, one_process, 8, TENSOR)


def spread(degrees: Degrees) -> dict[str, tuple[Tensor, torch.Size]]:
    """The weights of a rank whose random numbers are its own, whole, with the shape of what it has."""
    mesh = device_mesh(degrees, "cpu")
    torch.manual_seed(torch.distributed.get_rank())
    network = tiny_llama()
    plan, group = make_plan("1f1b", 2, 2, None), mesh["pipeline"].get_group()
    spread_stages(staged := StagedNetwork(plan, find_layout(network), "flops", group), mesh)
    own = {id(one) for one in staged.parameters}
    return {
        name: (one.full_tensor(), one.to_local().shape) if isinstance(one, DTensor) else (one.detach(), one.shape)
        for name, one in network.named_parameters()
        if id(one) in own
    }


@pytest.mark.parametrize("degrees", [Degrees(2, 1, 1, 2), Degrees(1, 2, 1, 2), Degrees(1, 1, 2, 2)])
def test_ranks_of_a_stage_begin_with_the_same_weights_and_hold_their_part(degrees: Degrees) -> None:
    first, second, third, fourth = run_on_ranks(spread, 4, degrees)
    tied = "model.embed_tokens.weight"
    for ours, theirs in ((first, second), (third, fourth)):
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[name][0], theirs[name][0]) for name in ours)
    assert first.keys() & third.keys() == {tied}
    assert torch.equal(first[tied][0], third[tied][0])
    parts = 1 if degrees.replicate == 2 else 2
    whole, shape = first["model.layers.0.mlp.up_proj.weight"]
    assert shape[0] * parts == whole.shape[0]
