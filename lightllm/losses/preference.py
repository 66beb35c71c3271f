"""Losses on pairs of answers, one chosen and one rejected, from their log probabilities under two networks."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def dpo_loss(
    policy_chosen: Tensor,
    policy_rejected: Tensor,
    reference_chosen: Tensor,
    reference_rejected: Tensor,
    beta: float = 0.1,
    label_smoothing: float = 0.0,
) -> Tensor:
    """Compute the loss of direct preference optimization (arXiv:2305.18290, equation 7) for each pair.

    With the margin `m = (policy_chosen - reference_chosen) - (policy_rejected - reference_rejected)`,

        loss = -(1 - label_smoothing) * log sigmoid(beta * m) - label_smoothing * log sigmoid(-beta * m)

    where `label_smoothing` is the share of pairs that are thought to be labelled the wrong way round (conservative
    DPO, https://ericmitchell.ai/cdpo.pdf); its loss is least at a finite margin.

    Args:
        policy_chosen: Log probability of each chosen answer, summed over its tokens, under the trained network
            `[pairs]`.
        policy_rejected: The same of the rejected answer.
        reference_chosen: As `policy_chosen`, under the reference.
        reference_rejected: As `policy_rejected`, under the reference.
        beta: How strongly the policy is held to the reference, above 0.
        label_smoothing: Probability that a label is wrong, in `[0, 0.5)`.

    Returns:
        Losses `[pairs]`.

    Raises:
        ValueError: if shapes differ, or `beta` or `label_smoothing` is out of its range.
    """
    _check_beta(beta)
    if not 0.0 <= label_smoothing < 0.5:
        raise ValueError(
            f"label_smoothing is {label_smoothing}: give a number in [0, 0.5); from 0.5 on the labels say nothing"
        )
    logits = beta * _margin(policy_chosen, policy_rejected, reference_chosen, reference_rejected)
    return -(1.0 - label_smoothing) * F.logsigmoid(logits) - label_smoothing * F.logsigmoid(-logits)


def ipo_loss(
    policy_chosen: Tensor,
    policy_rejected: Tensor,
    reference_chosen: Tensor,
    reference_rejected: Tensor,
    beta: float = 0.1,
) -> Tensor:
    """Compute the loss of identity preference optimization (arXiv:2310.12036, equation 17) for each pair.

    With the margin `m` of `dpo_loss`, `loss = (m - 1 / (2 * beta)) ** 2`: the margin is regressed to a finite value
    instead of being pushed without end. `beta` is the paper's tau.

    Args:
        policy_chosen: Log probability of each chosen answer, *averaged* over its tokens, under the trained network
            `[pairs]`; a sum would ask the same margin of a word and of a page.
        policy_rejected: The same of the rejected answer.
        reference_chosen: As `policy_chosen`, under the reference.
        reference_rejected: As `policy_rejected`, under the reference.
        beta: How strongly the policy is held to the reference, above 0.

    Returns:
        Losses `[pairs]`.

    Raises:
        ValueError: if shapes differ, or `beta` is not positive.
    """
    _check_beta(beta)
    margin = _margin(policy_chosen, policy_rejected, reference_chosen, reference_rejected)
    return (margin - 1.0 / (2.0 * beta)).square()


def implicit_rewards(policy: Tensor, reference: Tensor, beta: float = 0.1) -> Tensor:
    """Return `beta * (policy - reference)`, the reward that makes the policy optimal, up to a constant per prompt.

    From arXiv:2305.18290, equation 5. Detached, for metrics, such as the share of pairs whose chosen answer has the
    larger reward.

    Args:
        policy: Log probability of each answer under the trained network `[pairs]`.
        reference: The same under the reference.
        beta: As in the loss.

    Returns:
        Rewards `[pairs]`, without gradient.
    """
    return beta * (policy - reference).detach()


def _margin(
    policy_chosen: Tensor, policy_rejected: Tensor, reference_chosen: Tensor, reference_rejected: Tensor
) -> Tensor:
    """Return how much more the policy than the reference prefers the chosen answer, in nats, `[pairs]`."""
    shapes = [list(t.shape) for t in (policy_chosen, policy_rejected, reference_chosen, reference_rejected)]
    if any(shape != shapes[0] for shape in shapes):
        raise ValueError(
            f"log probabilities have shapes {shapes} (policy chosen and rejected, reference chosen and rejected): "
            "give one per pair, [pairs], in each"
        )
    return (policy_chosen - policy_rejected) - (reference_chosen - reference_rejected)


def _check_beta(beta: float) -> None:
    if not beta > 0.0:
        raise ValueError(f"beta is {beta}: give a positive number")
