"""Multiplying gradients by a number that is known only after they were formed."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor


def scale_in_place(tensors: list[Tensor], factor: Tensor) -> None:
    """Multiply tensors of any dtype, on any device and distributed in any way, by one number."""
    alike: dict[tuple[torch.device, torch.dtype, DeviceMesh | None], list[Tensor]] = {}
    for tensor in tensors:
        mesh = tensor.device_mesh if isinstance(tensor, DTensor) else None
        alike.setdefault((tensor.device, tensor.dtype, mesh), []).append(tensor)
    for (device, dtype, _), group in alike.items():
        if dtype in (torch.float32, torch.float64):
            torch._foreach_mul_(group, factor.to(device, dtype))  # one kernel instead of one for every tensor
        else:  # whose kernel wants a number of their own dtype, which would be rounded
            for tensor in group:
                tensor.mul_(factor.to(device, torch.float32))
