"""Which parameters are decayed, and by what they are trained if nothing else is named."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer


def parameter_groups(module: nn.Module) -> list[dict[str, Any]]:
    """Trainable parameters in two groups: matrices with the optimizer's weight decay, norms and biases without.

    A parameter of one dimension is a norm's or a bias; an adapter's matrices are decayed like any other.

    Raises:
        ValueError: Nothing trains.
    """
    trainable = [parameter for parameter in module.parameters() if parameter.requires_grad]
    if not trainable:
        raise ValueError("no parameter trains: every one is frozen")
    groups: list[dict[str, Any]] = [
        {"params": [parameter for parameter in trainable if parameter.ndim >= 2]},
        {"params": [parameter for parameter in trainable if parameter.ndim < 2], "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]


def adamw(parameters: Iterable[Any]) -> Optimizer:
    """AdamW as language models are usually trained: what an objective takes when no optimizer is named."""
    return torch.optim.AdamW(parameters, lr=3e-4, betas=(0.9, 0.95), weight_decay=0.1, fused=True)
