"""What an optimizer holds for each weight, found by having it step on a small one."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lightllm.parallel.operation_meter import OperationMeter
from lightllm.parallel.plan_memory import OptimizerCost

_SIDE = 128
"""Of the matrix that is stepped on: optimizers of 8 bits keep small ones in full."""


def optimizer_cost(make: Callable[[Iterable[Any]], Optimizer], dtype: torch.dtype, kind: str = "cpu") -> OptimizerCost:
    """Measure an optimizer on a small matrix.

    Args:
        make: Makes it from parameters.
        dtype: Of the weights that train.
        kind: The device of the run: on a GPU, torch steps on all tensors at once unless told otherwise.
    """
    parameter = nn.Parameter(torch.zeros(_SIDE, _SIDE, dtype=dtype))
    optimizer = make([parameter])
    for _ in range(2):  # its state is there from the second step on
        parameter.grad = torch.ones_like(parameter)
        meter = OperationMeter()
        with meter:
            optimizer.step()
    count = parameter.numel()
    state = sum(one.numel() * one.element_size() for one in optimizer.state[parameter].values() if _is_large(one))
    scratch = meter.peak / count
    group = optimizer.param_groups[0]
    at_once = kind != "cpu" and "foreach" in group and group["foreach"] is not False and not group.get("fused")
    return OptimizerCost(state / count, 0.0 if at_once else scratch, dtype.itemsize if at_once else 0.0)


def _is_large(value: Any) -> bool:
    return isinstance(value, Tensor) and value.numel() > 1
