"""The stages of a rank, spread further: over ranks that share their matrices, and over ranks that share their weights.

Each block of a stage is a group of `fully_shard`'s, and the stage is one with all else that it has: torch's schedules
gather a stage before they use it and sum its gradients over ranks once a step, when all micro-batches are through.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard

from lightllm.parallel.degrees import DATA_AXES
from lightllm.parallel.sharding import Sharding
from lightllm.parallel.staged_network import StagedNetwork
from lightllm.parallel.tensor_plan import split_layers


def spread_stages(staged: StagedNetwork, mesh: DeviceMesh) -> None:
    """Spread the stages of every rank over a mesh of `degrees.AXES`, in place. Every rank must call it.

    Raises:
        ValueError: Some layer cannot be split so; the message says why.
    """
    _make_same(staged, mesh)
    if mesh["tensor"].size() > 1:
        split_layers(staged.network, mesh["tensor"])
    if mesh["shard"].size() == 1:
        return
    ties = _ties(staged)
    # Gathered weights stay until torch's schedule frees them: micro-batches of other stages may come in between.
    options = {"mesh": mesh[DATA_AXES], "mp_policy": Sharding().precision(), "reshard_after_forward": False}
    for stage in staged.stages:
        for block in stage.blocks:
            fully_shard(block, **options)  # type: ignore[call-overload]
        fully_shard(stage, **options)  # type: ignore[call-overload]
    for module, name, other, other_name in ties:
        module._parameters[name] = other._parameters[other_name]


@torch.no_grad()
def _make_same(staged: StagedNetwork, mesh: DeviceMesh) -> None:
    """Give ranks that have the same stages the weights of the first of them; and both ends a weight that they share."""
    own: list[Tensor] = [*staged.parameters, *(one for stage in staged.stages for one in stage.buffers())]
    for axis in (*DATA_AXES, "tensor"):
        if mesh[axis].size() > 1:
            for tensor in own:
                torch.distributed.broadcast(tensor, group=mesh[axis].get_group(), group_src=0)
    for parameter in staged.shared:
        if staged.has_last:
            torch.distributed.recv(parameter, group=staged.group, group_src=staged.other_end)
        else:
            torch.distributed.send(parameter, group=staged.group, group_dst=staged.other_end)


def _ties(staged: StagedNetwork) -> list[tuple[nn.Module, str, nn.Module, str]]:
    """Places in the network, but in no stage of this rank, of weights that one of its stages has, with their place."""
    inside = {module for stage in staged.stages for module in stage.modules()}
    owned = {
        id(parameter): (module, name)
        for module in inside
        for name, parameter in module._parameters.items()
        if parameter is not None
    }
    return [
        (module, name, *owned[id(parameter)])
        for module in staged.network.modules()
        if module not in inside
        for name, parameter in module._parameters.items()
        if parameter is not None and id(parameter) in owned
    ]
