"""Preference losses against formulas written out by hand, and their optima."""

from __future__ import annotations

import math

import pytest
import torch

from lightllm.losses import dpo_loss, implicit_rewards, ipo_loss

PAIRS = [
    (-10.0, -12.0, -11.0, -11.5),
    (-5.0, -3.0, -4.0, -4.0),
    (-8.0, -8.0, -8.0, -8.0),
    (-900.0, -20.0, -10.0, -15.0),
]


def columns() -> list[torch.Tensor]:
    return [torch.tensor(column, dtype=torch.float64, requires_grad=True) for column in zip(*PAIRS, strict=True)]


@pytest.mark.parametrize("beta", [0.1, 0.5])
@pytest.mark.parametrize("label_smoothing", [0.0, 0.1])
def test_dpo_by_hand(beta: float, label_smoothing: float) -> None:
    losses = dpo_loss(*columns(), beta=beta, label_smoothing=label_smoothing)
    for loss, (chosen, rejected, reference_chosen, reference_rejected) in zip(losses, PAIRS, strict=True):
        x = beta * ((chosen - reference_chosen) - (rejected - reference_rejected))
        # log sigmoid(x) = -log(1 + exp(-x))
        expected = (1 - label_smoothing) * math.log1p(math.exp(-x)) + label_smoothing * math.log1p(math.exp(x))
        assert math.isclose(loss.item(), expected, rel_tol=1e-12)


def test_dpo_without_a_margin_is_log_two() -> None:
    same = torch.tensor([-3.0, -7.0])
    torch.testing.assert_close(dpo_loss(same, same, same, same), torch.full((2,), math.log(2)))


def test_dpo_gradient_raises_the_chosen_and_lowers_the_rejected() -> None:
    given = columns()
    beta = 0.3
    by_chosen, by_rejected = torch.autograd.grad(dpo_loss(*given, beta=beta).sum(), given[:2])
    chosen, rejected, reference_chosen, reference_rejected = (column.detach() for column in given)
    margin = (chosen - reference_chosen) - (rejected - reference_rejected)
    # Equation 8 of the paper's gradient: beta * sigmoid(-beta * margin), the weight of wrongly ordered pairs.
    torch.testing.assert_close(by_chosen, -beta * torch.sigmoid(-beta * margin))
    torch.testing.assert_close(by_rejected, -by_chosen)


def test_conservative_dpo_is_least_at_a_finite_margin() -> None:
    beta, smoothing = 0.1, 0.2
    zero = torch.zeros(1, dtype=torch.float64)
    best = torch.tensor([math.log((1 - smoothing) / smoothing) / beta], dtype=torch.float64, requires_grad=True)
    (slope,) = torch.autograd.grad(dpo_loss(best, zero, zero, zero, beta, smoothing).sum(), best)
    torch.testing.assert_close(slope, zero, atol=1e-12, rtol=0.0)


@pytest.mark.parametrize("beta", [0.1, 0.5])
def test_ipo_by_hand_and_least_at_its_margin(beta: float) -> None:
    losses = ipo_loss(*columns(), beta=beta)
    for loss, (chosen, rejected, reference_chosen, reference_rejected) in zip(losses, PAIRS, strict=True):
        expected = (chosen - rejected - reference_chosen + reference_rejected - 1 / (2 * beta)) ** 2
        assert math.isclose(loss.item(), expected, rel_tol=1e-12)
    zero = torch.zeros(1)
    assert ipo_loss(torch.tensor([1 / (2 * beta)]), zero, zero, zero, beta).item() == pytest.approx(0.0, abs=1e-12)


def test_losses_are_per_pair() -> None:
    given = columns()
    for loss in (dpo_loss, ipo_loss):
        whole = loss(*given)
        assert whole.shape == (len(PAIRS),)
        for index in range(len(PAIRS)):
            torch.testing.assert_close(loss(*(column[index : index + 1] for column in given)), whole[index : index + 1])


def test_rewards_order_pairs_as_the_loss_does() -> None:
    chosen, rejected, reference_chosen, reference_rejected = columns()
    margin = implicit_rewards(chosen, reference_chosen, 0.1) - implicit_rewards(rejected, reference_rejected, 0.1)
    losses = dpo_loss(chosen, rejected, reference_chosen, reference_rejected, 0.1)
    torch.testing.assert_close(torch.nn.functional.softplus(-margin), losses.detach())
    assert not margin.requires_grad


def test_errors() -> None:
    one, two = torch.zeros(1), torch.zeros(2)
    with pytest.raises(ValueError, match=r"shapes \[\[2\], \[2\], \[1\], \[2\]\]"):
        dpo_loss(two, two, one, two)
    for loss in (dpo_loss, ipo_loss):
        with pytest.raises(ValueError, match="beta is 0"):
            loss(one, one, one, one, beta=0.0)
    with pytest.raises(ValueError, match=r"label_smoothing is 0.5"):
        dpo_loss(one, one, one, one, label_smoothing=0.5)
