from __future__ import annotations

import torch
from ranks import run_on_ranks
from torch import Tensor
from torch import distributed as dist

from lightllm.modules.gathering import gather_rows

SIZES = [2, 0, 3]


def rows_of(rank: int) -> Tensor:
    return torch.randn(SIZES[rank], 4, generator=torch.Generator().manual_seed(rank))


def weights_of(rank: int) -> Tensor:
    return torch.randn(sum(SIZES), 4, generator=torch.Generator().manual_seed(10 + rank))


def gather_on_rank() -> tuple[Tensor, int, Tensor]:
    rank = dist.get_rank()
    rows = rows_of(rank).requires_grad_()
    whole, begin = gather_rows(rows)
    (whole.square() * weights_of(rank)).sum().backward()
    assert rows.grad is not None
    return whole.detach(), begin, rows.grad


def test_every_rank_has_all_rows_and_the_gradient_of_all_losses() -> None:
    found = run_on_ranks(gather_on_rank, 3)
    whole = torch.cat([rows_of(rank) for rank in range(3)]).requires_grad_()
    sum((whole.square() * weights_of(rank)).sum() for rank in range(3)).backward()  # type: ignore[union-attr]
    assert whole.grad is not None
    for rank, (gathered, begin, gradient) in enumerate(found):
        assert torch.equal(gathered, whole.detach())
        assert begin == sum(SIZES[:rank])
        torch.testing.assert_close(gradient, whole.grad[begin : begin + SIZES[rank]])
