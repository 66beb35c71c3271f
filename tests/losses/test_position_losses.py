"""The operator's contract with torch: schema, shapes under tracing, no aliases of inputs."""

from __future__ import annotations

import pytest
import torch

from lightllm.losses.position_losses import position_losses


@pytest.mark.parametrize("needs", [(False, False, False), (True, False, False), (True, True, True)])
@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_operator_contract(dtype: torch.dtype, with_bias: bool, needs: tuple[bool, bool, bool]) -> None:
    hidden, weight = torch.randn(2, 5, 8), torch.randn(20, 8)
    bias = torch.randn(20) if with_bias else None
    labels = torch.randint(0, 20, (2, 5))
    labels[0, 0] = -100
    arguments = (hidden, weight, bias, labels, torch.rand(2, 5), 0.1, 0.1, 3.0, 2.0, -100, 4, dtype, *needs)
    torch.library.opcheck(position_losses, arguments, test_utils=("test_schema", "test_faketensor"))


def test_factors_weigh_the_gradients_not_the_losses() -> None:
    hidden, weight, labels = torch.randn(6, 8), torch.randn(20, 8), torch.randint(0, 20, (6,))
    options = (0.0, 0.0, None, 1.0, -100, None, torch.float32, True, True, False)
    losses, by_hidden, *_ = position_losses(hidden, weight, None, labels, None, *options)
    factors = torch.tensor([0.0, 1.0, -2.0, 0.5, 3.0, 1.0])
    weighted, by_hidden_weighted, *_ = position_losses(hidden, weight, None, labels, factors, *options)
    assert torch.equal(losses, weighted)
    torch.testing.assert_close(by_hidden_weighted, factors.unsqueeze(1) * by_hidden)
