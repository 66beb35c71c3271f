"""How many ways a run is cut along each axis, and the device mesh that follows."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Literal

from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

AXES = ("pipeline", "replicate", "shard", "tensor")
"""Axes of the mesh, outermost first: ranks of the last one exchange most, so they are neighbours in the machine."""

DATA_AXES = ("replicate", "shard")
"""Axes along which ranks see different batches."""


@dataclass(frozen=True)
class Degrees:
    """How many ranks there are along each axis.

    Args:
        replicate: Copies of the weights, each taking batches of its own.
        shard: Ranks that share one copy of the weights, each taking batches of its own; `auto` is what the other
            degrees leave of the ranks that there are.
        tensor: Ranks that share the matrices of a layer and work on the same batch.
        pipeline: Stages of layers, through which the same batch goes.

    Raises:
        ValueError: A degree is not at least 1.
    """

    replicate: int = 1
    shard: int | Literal["auto"] = "auto"
    tensor: int = 1
    pipeline: int = 1

    def __post_init__(self) -> None:
        for axis in AXES:
            degree = getattr(self, axis)
            if degree != "auto" and degree < 1:
                raise ValueError(f"{axis} is {degree}: a degree is at least 1, which leaves that axis out")

    def resolved(self, world_size: int) -> Degrees:
        """The same with a number for `shard`.

        Raises:
            ValueError: The degrees do not multiply to the number of ranks; the message names both.
        """
        others = self.replicate * self.tensor * self.pipeline
        found = self if isinstance(self.shard, int) else replace(self, shard=max(1, world_size // others))
        product = math.prod(found.sizes)
        if product != world_size:
            written = " x ".join(f"{axis} {getattr(self, axis)}" for axis in AXES)
            raise ValueError(
                f"{written} does not make the {world_size} ranks that there are"
                + (f" ({product})" if self.shard != "auto" else "")
                + ": their product is trainer.devices x trainer.num_nodes"
            )
        return found

    @property
    def sizes(self) -> tuple[int, int, int, int]:
        """Ranks along each of `AXES`, once `shard` is a number."""
        assert isinstance(self.shard, int)
        return self.pipeline, self.replicate, self.shard, self.tensor

    @property
    def num_data_ranks(self) -> int:
        """Groups of ranks that see batches of their own, once `shard` is a number."""
        assert isinstance(self.shard, int)
        return self.replicate * self.shard


def device_mesh(degrees: Degrees, device_type: str) -> DeviceMesh:
    """Lay the ranks out in the axes of `AXES`; those of size 1 are there too. Every rank must call it.

    Args:
        degrees: Resolved for the ranks that there are.
        device_type: `cpu`, `cuda`, ….
    """
    return init_device_mesh(device_type, degrees.sizes, mesh_dim_names=AXES)
