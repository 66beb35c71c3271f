"""Sharded data parallelism by torch's `fully_shard` (FSDP2): weights, gradients and optimizer state cut over ranks.

Each block of a network is a group of its own: gathered before it runs, freed after, gathered again for its backward
pass. Everything else (embedding, final norm, head, projections) is the group of the whole Lightning module, whose
forward is a whole step. Within a step these are plain tensors, so a loss that takes the head's matrix, or an objective
that calls a network twice, needs to know nothing of sharding.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from lightning.pytorch import LightningModule
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import (
    CPUOffloadPolicy,
    FSDPModule,
    MixedPrecisionPolicy,
    OffloadPolicy,
    fully_shard,
    register_fsdp_forward_method,
)

from lightllm.models.anatomy import blocks
from lightllm.models.network import Dtype, torch_dtype
from lightllm.parallel.degrees import DATA_AXES

STEPS = ("training_step", "validation_step", "test_step", "predict_step")
"""The methods within which the weights that belong to no block are whole."""


@dataclass(frozen=True)
class Sharding:
    """How weights are sharded.

    Args:
        reshard_after_forward: Free a block's gathered weights between its forward and its backward pass, and gather
            them again: less memory, half as much communication again.
        parameter_dtype: In which weights are gathered and computed with; None is their own.
        reduce_dtype: In which gradients are summed over ranks; None is that of the gradients.
        cpu_offload: Keep the shards, gradients and optimizer state in the processor's memory.

    Raises:
        ValueError: A dtype is `auto`.
    """

    reshard_after_forward: bool = True
    parameter_dtype: Dtype | None = None
    reduce_dtype: Dtype | None = None
    cpu_offload: bool = False

    def __post_init__(self) -> None:
        for name in ("parameter_dtype", "reduce_dtype"):
            if getattr(self, name) == "auto":
                raise ValueError(f"{name} is 'auto': name a dtype, or leave it out for the weights' own")

    def precision(self) -> MixedPrecisionPolicy:
        """What torch is told of dtypes. Outputs of a step are losses, which stay as they are."""
        parameter, reduce = (
            None if name is None else torch_dtype(name) for name in (self.parameter_dtype, self.reduce_dtype)
        )
        assert not isinstance(parameter, str)
        assert not isinstance(reduce, str)
        return MixedPrecisionPolicy(param_dtype=parameter, reduce_dtype=reduce)

    def offload(self, device_type: str) -> OffloadPolicy:
        """Where the shards are kept."""
        return CPUOffloadPolicy(pin_memory=device_type != "cpu") if self.cpu_offload else OffloadPolicy()


def shard(module: LightningModule, networks: Sequence[nn.Module], mesh: DeviceMesh, sharding: Sharding) -> None:
    """Shard every block of some networks, and the rest of the module as one group, in place.

    Weights that are stored as integers (QLoRA's) stay whole on every rank: bitsandbytes keeps what belongs to them
    elsewhere.

    Args:
        module: The module that holds them.
        networks: Those with blocks.
        mesh: With the axes of `degrees.AXES`.
        sharding: How.
    """
    whole = {parameter for parameter in module.parameters() if not parameter.is_floating_point()}
    stacks = [blocks(network) for network in networks]
    for block in (block for stack in stacks for block in stack):
        fully_shard(
            block,
            mesh=mesh[DATA_AXES],
            reshard_after_forward=sharding.reshard_after_forward,
            mp_policy=sharding.precision(),
            offload_policy=sharding.offload(mesh.device_type),
            ignored_params=whole,
        )
    fully_shard(
        module,
        mesh=mesh[DATA_AXES],
        mp_policy=sharding.precision(),
        offload_policy=sharding.offload(mesh.device_type),
        ignored_params=whole,
    )
    for step in STEPS:
        register_fsdp_forward_method(module, step)


def reshard(module: nn.Module) -> None:
    """Free what is gathered, so that parameters are the shards again; the outermost group stays whole after a step."""
    for one in module.modules():
        if isinstance(one, FSDPModule):
            one.reshard()
