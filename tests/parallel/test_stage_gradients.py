from __future__ import annotations

import pytest
import torch
from ranks import run_on_ranks
from torch import nn
from torch.distributed.device_mesh import init_device_mesh

from lightllm.parallel.stage_gradients import StageGradients


def complete(frozen: bool) -> list[torch.Tensor | None]:
    """Two pipelines of two ranks, whose ends share a weight; the gradients are the ranks' numbers, plus 1."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("pipeline", "data"))
    value = float(torch.distributed.get_rank() + 1)
    shared, own = nn.Parameter(torch.zeros(2)), nn.Parameter(torch.zeros(3))
    shared.requires_grad_(not frozen)
    other = 1 - mesh.get_local_rank("pipeline")
    gradients = StageGradients([shared, own], [shared], other, mesh["pipeline"].get_group(), mesh["data"].get_group())
    own.grad = torch.full((3,), 100.0)  # of the step before
    gradients.begin(first=True)
    own.grad = torch.full((3,), value - 1)
    gradients.put_aside()
    gradients.give_back()
    gradients.begin(first=False)
    assert own.grad is None
    own.grad = torch.ones(3)
    shared.grad = None if frozen or value == 1.0 else torch.full((2,), value)
    gradients.put_aside()
    assert own.grad is None
    own.grad = torch.zeros(3)  # what Lightning clears here is not what was put aside
    gradients.give_back()
    gradients.complete(torch.tensor(0.5))
    return [shared.grad, own.grad]


@pytest.mark.parametrize("frozen", [False, True])
def test_gradients_are_means_over_data_and_sums_over_the_ends(frozen: bool) -> None:
    for rank, (shared, own) in enumerate(run_on_ranks(complete, 4, frozen)):
        neighbours = (1, 2) if rank < 2 else (3, 4)
        assert torch.equal(own, torch.full((3,), 0.5 * sum(neighbours) / 2))
        if frozen:
            assert shared is None
        else:  # the first rank had none
            assert torch.equal(shared, torch.full((2,), 0.5 * (2 + 3 + 4) / 2))
