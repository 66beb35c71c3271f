import pytest
import torch
from torch import Tensor

from lightllm.compression.hard_concrete import (
    ColumnGates,
    open_probability,
    open_probability_gradient,
    sampled_gates,
    settled_gates,
)

LOGITS = torch.linspace(-4, 4, 9, dtype=torch.float64)


def drawn_by_the_paper(logits: Tensor, uniform: Tensor) -> Tensor:
    """Equations 10 and 11, with beta 2/3, gamma -0.1 and zeta 1.1."""
    s = torch.sigmoid((torch.log(uniform) - torch.log(1 - uniform) + logits) / (2 / 3))
    return torch.minimum(torch.ones(()), torch.maximum(torch.zeros(()), s * 1.2 - 0.1))


def test_gates_are_those_of_the_papers_equations() -> None:
    uniform = torch.rand(50, 9, dtype=torch.float64)
    gates = sampled_gates(LOGITS, uniform)
    torch.testing.assert_close(gates, drawn_by_the_paper(LOGITS, uniform))
    assert (gates == 0).any()
    assert (gates == 1).any()
    assert ((gates > 0) & (gates < 1)).any()
    expected = torch.minimum(torch.ones(()), torch.maximum(torch.zeros(()), torch.sigmoid(LOGITS) * 1.2 - 0.1))
    torch.testing.assert_close(settled_gates(LOGITS), expected)


def test_the_expected_number_of_open_gates_is_that_of_many_draws() -> None:
    draws = 200_000
    uniform = torch.rand(draws, 9, dtype=torch.float64)
    share = (sampled_gates(LOGITS, uniform) != 0).double().mean(0)
    expected = open_probability(LOGITS)
    deviation = (expected * (1 - expected) / draws).sqrt()
    assert ((share - expected).abs() < 5 * deviation).all()
    assert (share.sum() - expected.sum()).abs() < 5 * deviation.square().sum().sqrt()


def test_its_gradient_is_autograds() -> None:
    logits = LOGITS.clone().requires_grad_()
    open_probability(logits).sum().backward()
    torch.testing.assert_close(open_probability_gradient(LOGITS), logits.grad)
    draws = LOGITS.clone().requires_grad_()
    uniform = torch.rand(9, dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda one: sampled_gates(one, uniform), draws)


def test_gates_multiply_the_columns_of_their_units() -> None:
    gates = ColumnGates(3, 2, 0.9, torch.device("cpu"))
    weight = torch.randn(4, 6)
    torch.testing.assert_close(gates.gates, torch.full((3,), 0.9))
    torch.testing.assert_close(gates.eval()(weight), 0.9 * weight)
    with torch.no_grad():
        gates.logits.copy_(torch.tensor([-9.0, 0.0, 9.0]))
    masked = gates(weight)
    assert not masked[:, :2].any()
    torch.testing.assert_close(masked[:, 2:4], 0.5 * weight[:, 2:4])
    assert torch.equal(masked[:, 4:], weight[:, 4:])
    inputs = torch.randn(5, 6)
    units = inputs * gates.gates.repeat_interleave(2)
    torch.testing.assert_close(inputs @ masked.T, units @ weight.T)


def test_gates_are_drawn_while_they_learn_and_not_otherwise() -> None:
    gates, weight = ColumnGates(100, 1, 0.5, torch.device("cpu")), torch.ones(1, 100)
    first, second = gates(weight), gates(weight)
    assert not torch.equal(first, second)
    first.sum().backward()
    assert gates.logits.grad is not None
    assert gates.logits.grad.any()
    with torch.no_grad():
        assert torch.equal(gates(weight), gates(weight))  # an export in the midst of training
    gates.fix(0.1)
    assert torch.equal(gates(weight), gates(weight))
    before = gates.gates.clone()
    gates.logits.grad = None
    gates(weight).sum().backward()
    assert gates.logits.grad is None or not gates.logits.grad.any()
    with torch.no_grad():
        gates.logits.add_(1)  # an optimizer's momentum
    assert torch.equal(gates.gates, before)


def test_fixed_gates_below_the_threshold_are_closed_for_good() -> None:
    gates, weight = ColumnGates(3, 1, 0.5, torch.device("cpu")), torch.ones(2, 3)
    with torch.no_grad():
        gates.logits.copy_(torch.tensor([-1.5, 0.0, 9.0]))
    assert (gates.gates > 0).all()
    gates.fix(0.2)
    assert gates.gates.tolist() == [0, 0.5, 1]
    assert gates(weight)[0].tolist() == [0, 0.5, 1]
    again = ColumnGates(3, 1, 0.9, torch.device("cpu"))
    again.load_state_dict(gates.state_dict())
    assert torch.equal(again(weight), gates(weight))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_weight_keeps_its_dtype(dtype: torch.dtype) -> None:
    gates = ColumnGates(3, 1, 0.5, torch.device("cpu"))
    assert gates(torch.ones(2, 3, dtype=dtype)).dtype == dtype
