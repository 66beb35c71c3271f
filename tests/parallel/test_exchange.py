from __future__ import annotations

import torch
from ranks import run_on_ranks
from torch import Tensor

from lightllm.parallel.exchange import gather_last, sum_gradient, sum_parts


def matrices() -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(2)
    return tuple(torch.randn(4, 4, generator=generator, dtype=torch.float64) for _ in range(3))  # type: ignore[return-value]


def pair_of_layers() -> list[Tensor]:
    """`x A' B'` with the rows of A and the columns of B on two ranks."""
    x, a, b = matrices()
    group, rank = torch.distributed.group.WORLD, torch.distributed.get_rank()
    assert group is not None
    own = slice(2 * rank, 2 * rank + 2)
    x, a, b = x.requires_grad_(), a[own].clone().requires_grad_(), b[:, own].clone().requires_grad_()
    y = sum_parts((sum_gradient(x, group) @ a.T).tanh() @ b.T, group)
    y.square().sum().backward()
    return [y.detach(), x.grad, a.grad, b.grad]  # type: ignore[list-item]


def gathered_layer() -> list[Tensor]:
    x, a, _ = matrices()
    group, rank = torch.distributed.group.WORLD, torch.distributed.get_rank()
    assert group is not None
    x, a = x.requires_grad_(), a[2 * rank : 2 * rank + 2].clone().requires_grad_()
    y = gather_last(sum_gradient(x, group) @ a.T, group)
    y.pow(3).sum().backward()
    return [y.detach(), x.grad, a.grad]  # type: ignore[list-item]


def test_two_split_layers_are_two_whole_ones() -> None:
    x, a, b = (matrix.requires_grad_() for matrix in matrices())
    y = (x @ a.T).tanh() @ b.T
    y.square().sum().backward()
    assert x.grad is not None
    assert a.grad is not None
    assert b.grad is not None
    for rank, found in enumerate(run_on_ranks(pair_of_layers, 2)):
        own = slice(2 * rank, 2 * rank + 2)
        for ours, theirs in zip(found, [y.detach(), x.grad, a.grad[own], b.grad[:, own]], strict=True):
            torch.testing.assert_close(ours, theirs)


def test_a_gathered_output_is_that_of_the_whole_layer() -> None:
    x, a, _ = (matrix.requires_grad_() for matrix in matrices())
    y = x @ a.T
    y.pow(3).sum().backward()
    assert x.grad is not None
    assert a.grad is not None
    for rank, found in enumerate(run_on_ranks(gathered_layer, 2)):
        for ours, theirs in zip(found, [y.detach(), x.grad, a.grad[2 * rank : 2 * rank + 2]], strict=True):
            torch.testing.assert_close(ours, theirs)


def test_without_a_gradient_nothing_is_wrapped() -> None:
    x = torch.ones(2)
    assert sum_gradient(x, None) is x  # type: ignore[arg-type]
