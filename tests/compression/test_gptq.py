from __future__ import annotations

import pytest
import torch
from layer_inputs import damped, layer_and_inputs, output_error
from torch import Tensor

from lightllm.compression.gptq import gptq
from lightllm.compression.grids import Grid, Q4_0Grid, Q8_0Grid, SymmetricGrid

GRIDS: list[Grid] = [
    SymmetricGrid(4, 8),
    SymmetricGrid(8, 8),
    SymmetricGrid(4),
    SymmetricGrid(3, 12),
    Q4_0Grid(8),
    Q8_0Grid(8),
]


def plain_loop(weight: Tensor, moment: Tensor, grid: Grid, order: list[int] | None = None) -> tuple[Tensor, Tensor]:
    """Greedy quantization with optimal updates, equations 2 and 3 of the paper: the inverse loses a row a column.

    `moment` is damped. With an order of columns, scales are those of the weight as it was.
    """
    w, inverse = weight.clone(), torch.linalg.inv(moment)
    size = grid.groups(weight).shape[-1]
    scales = grid.scales(grid.groups(weight))
    left = list(range(weight.shape[1]))
    for column in order or left.copy():
        group = column // size
        if order is None and column % size == 0:
            scales[:, group] = grid.scales(w[:, column : column + size])
        q = grid.round(w[:, column : column + 1].clone(), scales[:, group])[:, 0].to(w.dtype)
        delta = (w[:, column] - q) / inverse[column, column]
        others = [one for one in left if one != column]
        w[:, others] -= delta[:, None] * inverse[column, others]
        w[:, column] = q
        inverse = inverse - torch.outer(inverse[:, column], inverse[column]) / inverse[column, column]
        left = others
    return w, scales


@pytest.mark.parametrize("grid", GRIDS, ids=str)
@pytest.mark.parametrize("block_size", [1, 4, 7, 10, 24, 128])
def test_is_a_plain_loop_of_the_algorithm(grid: Grid, block_size: int) -> None:
    weight, inputs = layer_and_inputs()
    found = gptq(weight, inputs.T @ inputs, grid, block_size=block_size)
    expected, scales = plain_loop(weight, damped(inputs, 0.01), grid)
    torch.testing.assert_close(found.weight, expected, rtol=1e-6, atol=1e-9)
    torch.testing.assert_close(found.scales, scales, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_activation_order_is_a_plain_loop_in_that_order(grid: Grid) -> None:
    weight, inputs = layer_and_inputs()
    order = sorted(range(24), key=lambda column: -float(inputs[:, column].square().sum()))
    found = gptq(weight, inputs.T @ inputs, grid, block_size=24, activation_order=True)
    expected, scales = plain_loop(weight, damped(inputs, 0.01), grid, order)
    torch.testing.assert_close(found.weight, expected, rtol=1e-6, atol=1e-9)
    assert torch.equal(found.scales, scales)


@pytest.mark.parametrize("activation_order", [False, True])
@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_on_the_grid_and_nearer_in_output_than_rounding(grid: Grid, activation_order: bool) -> None:
    weight, inputs = layer_and_inputs(out=32, width=96, positions=500)
    found = gptq(weight.float(), (inputs.T @ inputs).float(), grid, activation_order=activation_order)
    assert found.weight.dtype == torch.float32
    again = grid.round_weight(found.weight, found.scales)
    torch.testing.assert_close(again, found.weight, rtol=1e-6, atol=0)
    ours = output_error(found.weight - weight, inputs)
    nearest = output_error(grid.round_weight(weight.float()) - weight, inputs)
    assert ours < 0.8 * nearest


def test_inputs_that_do_not_depend_on_each_other_are_just_rounded() -> None:
    weight, grid = torch.randn(6, 16), SymmetricGrid(4, 8)
    found = gptq(weight, torch.diag(torch.rand(16) + 0.1), grid)
    assert torch.equal(found.weight, grid.round_weight(weight))


def test_a_weight_on_an_input_that_is_never_there_is_just_rounded() -> None:
    weight, inputs = layer_and_inputs()
    grid = SymmetricGrid(4, 24)
    found = gptq(weight, inputs.T @ inputs, grid)
    assert torch.equal(found.weight[:, 5], grid.round(weight[:, 5:6].clone(), found.scales[:, 0])[:, 0])


def test_refused() -> None:
    weight, inputs = layer_and_inputs()
    with pytest.raises(ValueError, match="block_size is 0"):
        gptq(weight, inputs.T @ inputs, SymmetricGrid(4, 8), block_size=0)
    with pytest.raises(ValueError, match="groups of 32"):
        gptq(weight, inputs.T @ inputs, SymmetricGrid(4, 32))


@pytest.mark.parametrize("activation_order", [False, True])
def test_zeros_stay_and_others_make_up_for_them(activation_order: bool) -> None:
    weight, inputs = layer_and_inputs(out=32, width=96, positions=500)
    pruned = weight * (torch.rand(weight.shape, generator=torch.Generator().manual_seed(2)) < 0.5)
    grid, moment = SymmetricGrid(4, 8), inputs.T @ inputs
    kept = gptq(pruned, moment, grid, activation_order=activation_order, keep_zeros=True)
    assert (kept.weight[pruned == 0] == 0).all()
    again = grid.round_weight(kept.weight, kept.scales)
    torch.testing.assert_close(again, kept.weight.to(again.dtype), rtol=1e-6, atol=0)
    nearest = output_error(grid.round_weight(pruned) - pruned, inputs)
    assert output_error(kept.weight - pruned, inputs) < 0.9 * nearest
    assert (gptq(pruned, moment, grid, activation_order=activation_order).weight[pruned == 0] != 0).any()
