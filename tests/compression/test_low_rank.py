import pytest
import torch
from torch import Tensor

from lightllm.compression.low_rank import spectrum


def matrix(out: int = 7, inputs: int = 5) -> Tensor:
    return torch.randn(out, inputs, dtype=torch.float64)


def correlated(inputs: int, tokens: int = 200) -> Tensor:
    """Inputs `[in, tokens]` some of whose directions vary much more than others."""
    mix = torch.randn(inputs, inputs, dtype=torch.float64) * torch.logspace(0, -2, inputs, dtype=torch.float64)
    return mix @ torch.randn(inputs, tokens, dtype=torch.float64)


def best_by_alternation(weight: Tensor, inputs: Tensor, rank: int) -> float:
    """The least `|W X - B A X|^2` of this rank, by least squares in turn from several starts."""
    target = weight @ inputs
    losses = []
    for _ in range(5):
        down = torch.randn(rank, weight.shape[1], dtype=torch.float64)
        for _ in range(300):
            up = torch.linalg.lstsq((down @ inputs).T, target.T).solution.T
            down = torch.linalg.pinv(up) @ weight
        losses.append((target - up @ down @ inputs).square().sum().item())
    return min(losses)


@pytest.mark.parametrize("shape", [(7, 5), (5, 7), (6, 6)])
def test_plain_components_are_the_best_of_any_rank(shape: tuple[int, int]) -> None:
    weight = matrix(*shape)
    parts = spectrum(weight)
    assert (parts.values.diff() <= 0).all()
    torch.testing.assert_close((parts.left * parts.values) @ parts.right, weight)
    for rank in range(1, min(shape) + 1):
        down, up = parts.factors(rank)
        assert (down.shape, up.shape) == ((rank, shape[1]), (shape[0], rank))
        error = (weight - up @ down).square().sum().item()
        assert error == pytest.approx(parts.loss(rank), rel=1e-9, abs=1e-12)
        assert error == pytest.approx(best_by_alternation(weight, torch.eye(shape[1]).double(), rank), abs=1e-6)


@pytest.mark.parametrize("shape", [(7, 5), (5, 7), (6, 6)])
def test_what_is_lost_on_the_inputs_is_the_energy_of_the_values_left_out(shape: tuple[int, int]) -> None:
    weight, inputs = matrix(*shape), correlated(shape[1])
    parts = spectrum(weight, inputs @ inputs.T, damping=0.0)
    torch.testing.assert_close((parts.left * parts.values) @ parts.right, weight)
    for rank in range(1, min(shape) + 1):
        down, up = parts.factors(rank)
        lost = ((weight - up @ down) @ inputs).square().sum().item()
        assert lost == pytest.approx(parts.loss(rank), rel=1e-8, abs=1e-9)
        assert lost == pytest.approx(parts.values[rank:].square().sum().item(), rel=1e-8, abs=1e-9)


@pytest.mark.parametrize("rank", [1, 2, 4])
def test_no_other_matrix_of_the_rank_loses_less_on_the_inputs(rank: int) -> None:
    weight, inputs = matrix(), correlated(5)
    whitened = spectrum(weight, inputs @ inputs.T, damping=0.0)
    plain = spectrum(weight).factors(rank)
    assert whitened.loss(rank) == pytest.approx(best_by_alternation(weight, inputs, rank), rel=1e-5)
    assert ((weight - plain.up @ plain.down) @ inputs).square().sum().item() > 1.2 * whitened.loss(rank)


def test_damping_adds_its_share_of_the_error_of_the_weights() -> None:
    weight, inputs = matrix(), correlated(5)
    moment = inputs @ inputs.T
    parts = spectrum(weight, moment, damping=0.3)
    down, up = parts.factors(2)
    error = weight - up @ down
    damped = (error @ inputs).square().sum() + 0.3 * moment.diagonal().mean() * error.square().sum()
    assert parts.loss(2) == pytest.approx(damped.item(), rel=1e-9)


def test_inputs_that_all_vary_alike_give_the_plain_components() -> None:
    weight = matrix()
    plain, whitened = spectrum(weight), spectrum(weight, 4 * torch.eye(5).double(), damping=0.0)
    torch.testing.assert_close(whitened.values, 2 * plain.values)
    for rank in (1, 3):
        ours, theirs = whitened.factors(rank), plain.factors(rank)
        torch.testing.assert_close(ours.up @ ours.down, theirs.up @ theirs.down)


def test_inputs_that_are_always_zero_cost_nothing_and_break_nothing() -> None:
    weight, inputs = matrix(), correlated(5)
    inputs[3] = 0
    parts = spectrum(weight, inputs @ inputs.T)
    down, up = parts.factors(4)
    assert ((weight - up @ down) @ inputs).square().sum() < 1e-4 * (weight @ inputs).square().sum()
    assert torch.isfinite(up @ down).all()


def test_a_moment_that_rounding_made_indefinite_is_damped_more() -> None:
    weight, inputs = matrix(), correlated(5, tokens=2)
    moment = inputs @ inputs.T
    moment -= 1e-5 * moment.diagonal().mean() * torch.eye(5)
    assert torch.isfinite(spectrum(weight, moment).factors(2).down).all()


def test_what_has_no_components_is_refused() -> None:
    weight = matrix()
    with pytest.raises(ValueError, match=r"\[4, 4\] for a layer of 5 inputs"):
        spectrum(weight, torch.eye(4))
    with pytest.raises(ValueError, match="zero or not finite"):
        spectrum(weight, torch.zeros(5, 5))
    with pytest.raises(ValueError, match="not positive definite"):
        spectrum(weight, torch.eye(5) - 0.9)
    with pytest.raises(ValueError, match="not finite everywhere"):
        spectrum(weight * torch.nan)
    for rank in (0, 6):
        with pytest.raises(ValueError, match=f"rank is {rank}, and the matrix has 5"):
            spectrum(weight).factors(rank)
