from __future__ import annotations

import pytest
import torch
from torch import Tensor

from lightllm.compression.grids import SymmetricGrid
from lightllm.compression.rounded_lora import ThinFactors, rounded_lora_linear

GRID = SymmetricGrid(4, 8)


def parts(rank: int = 3) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Inputs, weight, bias, up and down, in float64."""
    made = [torch.randn(shape, dtype=torch.float64) for shape in [(2, 5, 16), (12, 16), (12,), (12, rank), (rank, 16)]]
    return made[0], made[1], made[2], made[3], made[4]


@pytest.mark.parametrize("with_bias", [False, True])
def test_output_and_gradients_are_those_of_the_rounded_merged_weight(with_bias: bool) -> None:
    """Against autograd through the whole weight, rounded by `merged + (rounded - merged).detach()`."""
    x, weight, bias, up, down = parts()
    bias_or_none = bias if with_bias else None
    leaves = [one.clone().requires_grad_() for one in (x, up, down)]
    merged = weight + 0.5 * leaves[1] @ leaves[2]
    rounded = GRID.round_weight(merged.detach())
    expected = torch.nn.functional.linear(leaves[0], merged + (rounded - merged).detach(), bias_or_none)
    ours = [one.clone().requires_grad_() for one in (x, up, down)]
    found = rounded_lora_linear(ours[0], rounded, bias_or_none, ThinFactors(ours[1], ours[2], 0.5))
    torch.testing.assert_close(found, expected)
    for one in (expected, found):
        one.sin().sum().backward()
    for leaf, other in zip(leaves, ours, strict=True):
        assert other.grad is not None
        torch.testing.assert_close(other.grad, leaf.grad)


def test_factors_stay_in_float32_beside_bfloat16() -> None:
    x, weight, _, up, down = (part.bfloat16() for part in parts())
    leaves = [up.float().requires_grad_(), down.float().requires_grad_()]
    rounded_lora_linear(x, weight.float(), None, ThinFactors(leaves[0], leaves[1], 1.0)).sum().backward()
    assert all(leaf.grad is not None and leaf.grad.dtype == torch.float32 for leaf in leaves)


def test_no_matrix_of_the_weights_size_is_made() -> None:
    """Neither forward nor backward: that is what it is for."""
    x, weight, _, up, down = parts()
    up.requires_grad_()
    down.requires_grad_()
    made: list[torch.Size] = []

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, arguments=(), named=None):  # type: ignore[no-untyped-def]
            result = function(*arguments, **(named or {}))
            if function in (torch.ops.aten.mm.default, torch.ops.aten.addmm.default):
                made.append(result.shape)
            return result

    with Watch():
        rounded_lora_linear(x, weight, None, ThinFactors(up, down, 1.0)).sum().backward()
    assert made
    assert torch.Size([12, 16]) not in made
