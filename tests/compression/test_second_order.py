from __future__ import annotations

import pytest
import torch
from layer_inputs import damped, layer_and_inputs
from torch import Tensor

from lightllm.compression.second_order import SecondMoment, inverse_factor, replace_columns


def test_second_moment_is_the_sum_over_all_positions() -> None:
    inputs = torch.randn(50, 6)
    moment = SecondMoment()
    for begin, end in ((0, 1), (1, 30), (30, 50)):
        moment.add(inputs[begin:end])
    torch.testing.assert_close(moment.sum, inputs.T @ inputs)
    assert moment.positions == 50
    with pytest.raises(RuntimeError, match="no inputs were counted"):
        _ = SecondMoment().sum


@pytest.mark.parametrize("damping", [0.01, 0.3])
def test_factor_is_that_of_the_inverse(damping: float) -> None:
    _, inputs = layer_and_inputs()
    factor = inverse_factor(inputs.T @ inputs, damping)
    assert torch.equal(factor, factor.triu())
    assert (factor.diagonal() > 0).all()
    inverse = torch.linalg.inv(damped(inputs, damping))
    torch.testing.assert_close(factor.T @ factor, inverse, rtol=1e-8, atol=1e-12)
    torch.testing.assert_close(factor, torch.linalg.cholesky(inverse, upper=True), rtol=1e-6, atol=1e-10)


def test_factor_in_float32_is_near_that_in_float64() -> None:
    _, inputs = layer_and_inputs(width=200, positions=400)
    double = inverse_factor(inputs.T @ inputs, 0.01)
    single = inverse_factor((inputs.T @ inputs).float(), 0.01)
    assert single.dtype == torch.float32
    assert (single - double).norm() / double.norm() < 1e-4


def test_an_input_that_is_never_there_depends_on_no_other() -> None:
    _, inputs = layer_and_inputs()
    factor = inverse_factor(inputs.T @ inputs, 0.01)
    assert (factor[5, 6:] == 0).all()
    assert (factor[:5, 5] == 0).all()


@pytest.mark.parametrize(
    ("moment", "damping", "message"),
    [
        (torch.eye(3), -0.1, "a damping of -0.1"),
        (torch.full((2, 2), float("nan")), 0.01, "not finite"),
        (torch.tensor([[1.0, 2.0], [2.0, 1.0]]), 0.01, "not positive definite with a damping of 0.01: raise it"),
        (torch.ones(2, 2), 0.0, "raise it"),
    ],
)
def test_refused(moment: Tensor, damping: float, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        inverse_factor(moment, damping)


@pytest.mark.parametrize("block_size", [1, 5, 8, 24, 100])
def test_one_column_is_made_up_for_by_least_squares(block_size: int) -> None:
    weight, inputs = layer_and_inputs()
    factor = inverse_factor(inputs.T @ inputs, 0.01)
    changed = replace_columns(weight, factor, lambda column, now: now[:, column] * (column != 9), block_size)
    assert torch.equal(changed[:, :9], weight[:, :9])
    assert (changed[:, 9] == 0).all()
    # The columns behind, by least squares: their normal equations with the damped second moment.
    moment = damped(inputs, 0.01)
    update = torch.linalg.solve(moment[10:, 10:], moment[10:, 9:10] @ weight[:, 9:10].T).T
    torch.testing.assert_close(changed[:, 10:], weight[:, 10:] + update, rtol=1e-8, atol=1e-10)


def test_columns_that_stay_change_nothing() -> None:
    weight, inputs = layer_and_inputs()
    kept = weight.clone()
    factor = inverse_factor(inputs.T @ inputs, 0.01)
    assert torch.equal(replace_columns(weight, factor, lambda column, now: now[:, column], 8), kept)
    with pytest.raises(ValueError, match="block_size is 0"):
        replace_columns(weight, factor, lambda column, now: now[:, column], 0)
