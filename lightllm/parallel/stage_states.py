"""States of weights and optimizers that are spread over the stages of a pipeline, put together and taken apart.

Weights of other stages are on the meta device, under their own names and at their own places in the optimizer's
groups. So what a rank has is what is not on that device, and the whole is the union.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed import ProcessGroup
from torch.optim import Optimizer

from lightllm.parallel.states import gathered, load_optimizer, load_weights


def own_weights(module: nn.Module) -> dict[str, Tensor]:
    """What of the module's state this rank has, by name; put together where ranks share it, so all must call it."""
    own = {name: value for name, value in module.state_dict().items() if not is_elsewhere(value)}
    whole: dict[str, Tensor] = gathered(own, keep=True)
    return whole


def own_optimizer_state(optimizer: Optimizer) -> dict[str, Any]:
    """The optimizer's state of the weights that this rank has, likewise; its groups are of the whole network."""
    state = optimizer.state_dict()
    return {**state, "state": gathered(_of_own(optimizer, state["state"]), keep=True)}


def load_own_weights(module: nn.Module, whole: Mapping[str, Any]) -> None:
    """Load of a state of all weights what this rank has a place for."""
    elsewhere = {name for name, value in module.state_dict().items() if is_elsewhere(value)}
    load_weights(module, {name: value for name, value in whole.items() if name not in elsewhere})


def load_own_optimizer_state(optimizer: Optimizer, whole: Mapping[str, Any]) -> None:
    """Load of an optimizer's state for all weights what belongs to those that this rank has."""
    load_optimizer(optimizer, {**whole, "state": _of_own(optimizer, whole["state"])})


def put_together(mine: dict[Any, Any], group: ProcessGroup) -> dict[Any, Any]:
    """The union of all ranks' dictionaries, on the group's first rank; empty on the others. Every rank must call it.

    They come one after another, so that the first rank never holds more than the whole and one part.
    """
    rank, size = torch.distributed.get_rank(group), torch.distributed.get_world_size(group)
    if rank:
        torch.distributed.send_object_list([_on_cpu(mine)], group=group, group_dst=0)
        return {}
    whole = dict(_on_cpu(mine))
    for source in range(1, size):
        parts: list[Any] = [None]
        torch.distributed.recv_object_list(parts, group=group, group_src=source)
        whole |= parts[0]
    return whole


def is_elsewhere(value: object) -> bool:
    """Whether this is a weight that another stage has."""
    return isinstance(value, Tensor) and value.device.type == "meta"


def _of_own(optimizer: Optimizer, state: Mapping[Any, Any]) -> dict[Any, Any]:
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    return {index: state[index] for index, one in enumerate(parameters) if index in state and not is_elsewhere(one)}


def _on_cpu(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.detach().cpu()
    if isinstance(value, dict):
        return {key: _on_cpu(inner) for key, inner in value.items()}
    return value
