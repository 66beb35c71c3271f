from __future__ import annotations

import pytest
import torch
from parity import whole
from ranks import run_on_ranks
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, Shard, distribute_tensor

from lightllm.parallel.clipping import clip_to, gradient_norm


def tensors() -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(shape, generator=generator) for shape in ((4, 6), (5,), (3, 4), (2, 2))]


def parameters(gradients: list[Tensor]) -> list[nn.Parameter]:
    made = []
    for gradient in gradients:
        made.append(nn.Parameter(torch.zeros_like(gradient)))
        made[-1].grad = gradient
    return [*made, nn.Parameter(torch.zeros(3))]  # the last one has none


def clipped_on_a_mesh(largest: float) -> tuple[Tensor, list[Tensor]]:
    """One on both axes, one on an axis in uneven parts, one that every rank has, one that is no DTensor."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("a", "b"))
    first, second, third, fourth = tensors()
    mine = parameters(
        [
            distribute_tensor(first, mesh, [Shard(0), Shard(1)], src_data_rank=None),
            distribute_tensor(second, mesh["b"], [Shard(0)], src_data_rank=None),
            distribute_tensor(third, mesh["a"], [Replicate()], src_data_rank=None),
            fourth,
        ]
    )
    norm = gradient_norm(mine)
    clip_to(mine, largest, norm)
    return norm, [whole(one.grad) for one in mine if one.grad is not None]


@pytest.mark.parametrize("largest", [0.5, 100.0])
def test_norm_and_clipping_are_torchs_over_whole_gradients(largest: float) -> None:
    expected = parameters(tensors())
    norm = nn.utils.clip_grad_norm_(expected, largest)
    for found, gradients in run_on_ranks(clipped_on_a_mesh, 4, largest):
        torch.testing.assert_close(found, norm)
        for ours, theirs in zip(gradients, expected, strict=False):
            torch.testing.assert_close(ours, theirs.grad)


def test_no_gradients_have_no_norm() -> None:
    assert gradient_norm([nn.Parameter(torch.ones(2))]).item() == 0.0
