"""The norm of gradients that lie on different meshes or on none, and clipping by it."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn.utils import get_total_norm


def gradient_norm(parameters: Iterable[nn.Parameter]) -> Tensor:
    """Return the 2-norm of all gradients together, a float32 scalar; 0 where there are none.

    Sharded gradients are summed over their mesh, so every rank of it must call this.
    """
    by_mesh = defaultdict(list)
    device = torch.device("cpu")
    for parameter in parameters:
        gradient = parameter.grad
        if gradient is not None:
            # Torch's fused norm takes tensors of one kind and one mesh at a time.
            by_mesh[gradient.device_mesh if isinstance(gradient, DTensor) else None].append(gradient)
            device = gradient.device
    norms = [get_total_norm(gradients) for gradients in by_mesh.values()]
    whole = [(norm.full_tensor() if isinstance(norm, DTensor) else norm).float() for norm in norms]
    return torch.linalg.vector_norm(torch.stack(whole)) if whole else torch.zeros((), device=device)


@torch.no_grad()
def clip_to(parameters: Iterable[nn.Parameter], largest_norm: float, norm: Tensor) -> None:
    """Scale gradients of this norm so that it is at most `largest_norm`, as `clip_grad_norm_` does."""
    factor = (largest_norm / (norm + 1e-6)).clamp(max=1.0)
    for parameter in parameters:
        if parameter.grad is not None:
            local = parameter.grad.to_local() if isinstance(parameter.grad, DTensor) else parameter.grad
            local.mul_(factor.to(local.device, local.dtype))
