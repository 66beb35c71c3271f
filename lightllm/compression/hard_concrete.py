"""Gates that learn to be exactly 0 or 1: the hard concrete distribution (Louizos et al., arXiv:1712.01312).

A gate's logit `a` says how open it is. While it learns, the gate is a random number `clamp(s, 0, 1)` with
`s = sigmoid((log u - log(1 - u) + a) / B) * (Z - G) + G` and `u` uniform: stretched beyond [0, 1] and cut off, so that
it is exactly 0 or 1 some of the time and differentiable the rest. How many gates are open is then a number whose
expectation has a gradient.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from typing_extensions import override

TEMPERATURE = 2 / 3
"""`B`: the lower, the more often a gate is exactly 0 or 1."""
LOWEST = -0.1
"""`G`: from where the stretched gate is cut off at 0."""
HIGHEST = 1.1
"""`Z`: to where it is cut off at 1."""

_CLOSED = TEMPERATURE * math.log(-LOWEST / HIGHEST)


def sampled_gates(logits: Tensor, uniform: Tensor) -> Tensor:
    """Draw gates, differentiable in their logits where they are neither 0 nor 1.

    Args:
        logits: How open each is, any shape.
        uniform: Random numbers between 0 and 1, of the same shape.
    """
    noise = uniform.log() - (1 - uniform).log()
    return _cut_off(((noise + logits) / TEMPERATURE).sigmoid())


def settled_gates(logits: Tensor) -> Tensor:
    """The gates without noise, as they are used once they have learned (equation 13 of the paper)."""
    return _cut_off(logits.sigmoid())


def open_probability(logits: Tensor) -> Tensor:
    """The probability that a drawn gate is not 0 (equation 12); its sum is the expected number of open gates."""
    return (logits - _CLOSED).sigmoid()


def open_probability_gradient(logits: Tensor) -> Tensor:
    """The derivative of `open_probability`."""
    probability = open_probability(logits)
    return probability * (1 - probability)


def _cut_off(share: Tensor) -> Tensor:
    return (share * (HIGHEST - LOWEST) + LOWEST).clamp(0, 1)


class ColumnGates(nn.Module):
    """A mask with one learned gate for the columns of each unit that a layer reads: a neuron, a head.

    A gate multiplies its columns of the weight, which is to multiply the unit's output. It is drawn anew in every
    forward pass of training; in evaluation, in an export, and once it is fixed, it is what it has settled to.

    Args:
        num_gates: How many units.
        width: Columns of each, one unit after another.
        open_share: How open the gates are at first: the value that they settle to if nothing is learned.
        device: Of the weight.
    """

    fixed: Tensor
    values: Tensor

    def __init__(self, num_gates: int, width: int, open_share: float, device: torch.device) -> None:
        super().__init__()
        self.width = width
        inner = (open_share - LOWEST) / (HIGHEST - LOWEST)
        self.logits = nn.Parameter(torch.full((num_gates,), math.log(inner / (1 - inner)), device=device))
        self.register_buffer("fixed", torch.zeros((), dtype=torch.bool, device=device))
        self.register_buffer("values", torch.ones(num_gates, device=device))

    @property
    def gates(self) -> Tensor:
        """What the gates have settled to, float32 `[gates]`; exactly 0 where they are closed."""
        return self.values if self.fixed else settled_gates(self.logits.float())

    @torch.no_grad()
    def fix(self, threshold: float) -> None:
        """Leave the gates as they are from now on, and close those that are not above a threshold."""
        self.values.copy_(self.gates * (self.gates > threshold))
        self.fixed.fill_(True)

    @override
    def forward(self, weight: Tensor) -> Tensor:
        gates = self.gates
        if self.fixed:
            gates = gates + 0 * self.logits  # which take no part, but a reducer of gradients waits for theirs
        elif self.training and torch.is_grad_enabled():
            uniform = torch.rand_like(self.logits, dtype=torch.float32).clamp(1e-6, 1 - 1e-6)
            gates = sampled_gates(self.logits.float(), uniform)
        return weight * gates.to(weight.dtype).repeat_interleave(self.width)
