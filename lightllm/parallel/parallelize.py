"""The order in which a built module is spread over a mesh.

Tensor parallelism comes first, since it decides what a matrix is; then recomputation and compilation, which the build
pipeline has asked for already and which take effect when a block first runs; then sharding, whose hooks are around all
of that. Last, the weights: the first rank's reach all others.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from lightning.pytorch import LightningModule
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, distribute_tensor
from transformers import PreTrainedModel

from lightllm.models.anatomy import OwnNetwork, unwrapped
from lightllm.parallel.degrees import DATA_AXES
from lightllm.parallel.sharding import Sharding, shard
from lightllm.parallel.tensor_plan import split_layers


@dataclass(frozen=True)
class Spread:
    """How a module is spread over a mesh.

    Args:
        sharding: Over the ranks that see different batches.
        tensor_plan: Over the tensor axis; None is transformers' own plan.
    """

    sharding: Sharding
    tensor_plan: Mapping[str, str] | None = None


def parallelize(module: LightningModule, mesh: DeviceMesh, spread: Spread, device: torch.device) -> None:
    """Spread a module whose networks are built over a mesh of `degrees.AXES`, in place. Every rank must call it.

    The first network among its children is what trains, and is split over the tensor axis. Others (a teacher, a
    reference) are sharded too, and are whole on every rank of a tensor group.

    Args:
        module: The module.
        mesh: Over which.
        spread: How.
        device: This rank's.

    Raises:
        ValueError: It cannot be spread so; the message says why.
    """
    networks = networks_of(module)
    _agree(module)
    whole = _whole_weights(module) if torch.distributed.get_rank() == 0 else {}
    if mesh["tensor"].size() > 1:
        split_layers(networks[0], mesh["tensor"], spread.tensor_plan)
    if mesh[DATA_AXES].size() > 1:
        shard(module, networks, mesh, spread.sharding)
    if any(tensor.is_meta for _, tensor in _named_tensors(module)):
        give_room(module, torch.device("cpu") if spread.sharding.cpu_offload else device)
    hand_out(module, whole, device)


def networks_of(module: nn.Module) -> list[nn.Module]:
    """The networks with blocks among a module's children, in the order in which they were built."""
    return [child for child in module.children() if isinstance(unwrapped(child), (PreTrainedModel, OwnNetwork))]


def give_room(module: nn.Module, device: torch.device) -> None:
    """Have every tensor of a module that is on the meta device hold something, whatever; the others stay as they are.

    Torch's own `to_empty` would also forget tensors that hold something, and what metrics begin with.
    """
    module._apply(lambda tensor: torch.empty_like(tensor, device=device) if tensor.is_meta else tensor)


@torch.no_grad()
def hand_out(module: nn.Module, whole: Mapping[str, Tensor], device: torch.device) -> None:
    """Give every rank its parts of the first rank's parameters and buffers, one after another.

    Args:
        module: Spread already.
        whole: On the first rank, what it had whole before.
        device: Over which it is sent.
    """
    first = torch.distributed.get_rank() == 0
    for name, part in _named_tensors(module):
        full = whole[name].to(device) if first else torch.empty(part.shape, dtype=part.dtype, device=device)
        full = full.contiguous()
        torch.distributed.broadcast(full, 0)
        put_in(part, full)


@torch.no_grad()
def put_in(part: Tensor, full: Tensor) -> None:
    """Set a tensor, or what this rank has of it, to the values of a whole one."""
    if not isinstance(part, DTensor):
        part.copy_(full)
        return
    local = part.to_local()
    full = full.to(local.device, local.dtype)
    local.copy_(distribute_tensor(full, part.device_mesh, part.placements, src_data_rank=None).to_local())


@torch.no_grad()
def _agree(module: nn.Module) -> None:
    """Refuse ranks with different networks; one that is still without weights takes the first rank's dtypes.

    Raises:
        RuntimeError: They have; the message names a tensor.
    """
    mine = {name: (tuple(tensor.shape), tensor.dtype) for name, tensor in _named_tensors(module)}
    sent = [mine]
    torch.distributed.broadcast_object_list(sent, 0)
    for name in sorted({*mine, *sent[0]}):
        if name not in mine or name not in sent[0] or mine[name][0] != sent[0][name][0]:
            raise RuntimeError(
                f"{name} is {mine.get(name)} on rank {torch.distributed.get_rank()} and {sent[0].get(name)} on the "
                "first: every rank must build the same network"
            )
    for name, tensor in _named_tensors(module):
        if tensor.is_meta and tensor.dtype != sent[0][name][1]:
            tensor.data = tensor.to(sent[0][name][1])


def _whole_weights(module: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.detach() for name, tensor in _named_tensors(module)}


def _named_tensors(module: nn.Module) -> list[tuple[str, Tensor]]:
    return [*module.named_parameters(), *module.named_buffers()]
