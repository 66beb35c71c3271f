"""Weights and optimizer states of a spread module, from and to what a checkpoint holds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.optim import Optimizer

from lightllm.sharded_checkpoint import read_sharded


def gathered(value: Any, keep: bool) -> Any:
    """A checkpoint with whole tensors in the processor's memory; every rank must call it.

    They are gathered one after another, and dropped at once where they are not kept.

    Args:
        value: Of dictionaries, lists, tensors and plain values.
        keep: Whether this rank wants it.
    """
    if isinstance(value, DTensor):
        full = value.full_tensor()
        return full.cpu() if keep else None
    if isinstance(value, dict):
        return {key: gathered(inner, keep) for key, inner in value.items()}
    if isinstance(value, (list, tuple)) and type(value) in (list, tuple):
        return type(value)(gathered(inner, keep) for inner in value)
    return value


def read_checkpoint(path: Path, module: nn.Module, optimizers: Sequence[Optimizer]) -> dict[str, Any]:
    """Read a checkpoint's file, or of its folder this rank's parts; every rank must call it.

    Args:
        path: The file or folder.
        module: Spread already.
        optimizers: Of its parameters; none where they are not wanted.
    """
    if not path.is_dir():
        whole: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        return whole
    weights = module.state_dict()
    parameters = [_parameters(optimizer) for optimizer in optimizers]

    def template(name: str, size: torch.Size) -> Tensor | None:
        kind, _, within = name.partition(".")
        like: Tensor | None
        if kind == "state_dict":
            like = weights.get(within)
        else:
            number, index, _ = within.split(".", 2)
            like = parameters[int(number)][int(index)] if int(number) < len(parameters) else None
        return torch.zeros_like(like) if isinstance(like, DTensor) and like.shape == size else None

    return read_sharded(path, template, alone=False)


def load_weights(module: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Load whole tensors, or parts of this rank's layout, into a spread module; what is missing stays as it is."""
    current = module.state_dict()
    module.load_state_dict(
        {name: part_like(value, current[name]) if name in current else value for name, value in state.items()},
        strict=False,
    )


def load_optimizer(optimizer: Optimizer, state: Mapping[str, Any]) -> None:
    """Load an optimizer's state, whole or in parts of this rank's layout."""
    parameters = _parameters(optimizer)
    values = {
        index: {
            key: part_like(value, parameters[index])
            if isinstance(value, Tensor) and value.shape == parameters[index].shape
            else value
            for key, value in of_parameter.items()
        }
        for index, of_parameter in state["state"].items()
    }
    optimizer.load_state_dict({**state, "state": values})


def part_like(value: Tensor, like: Tensor) -> Tensor:
    """What a rank has of a whole tensor that is laid out like another."""
    if not isinstance(like, DTensor) or isinstance(value, DTensor):
        return value
    device = like.to_local().device
    part: Tensor = distribute_tensor(value.to(device), like.device_mesh, like.placements, src_data_rank=None)
    return part


def _parameters(optimizer: Optimizer) -> list[Tensor]:
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]
