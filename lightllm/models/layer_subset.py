"""A smaller network out of a larger one: some of its layers."""

from __future__ import annotations

from typing import Any

from torch import nn
from typing_extensions import override

from lightllm.models.anatomy import blocks
from lightllm.models.layer_removal import keep_layers
from lightllm.models.network import BuildRequest
from lightllm.models.pretrained import Pretrained


class EveryNthLayer(Pretrained):
    """A pretrained network with every n-th of its layers, as a student to begin with (arXiv:1910.01108, section 3).

    Embedding, final norm and head are kept. It is an ordinary network of its architecture, with fewer layers.

    Args:
        name: The network whose layers are taken; see `Pretrained`.
        step: How many layers to go on from one that is kept to the next.
        first: The first layer that is kept, counted from 0.
        pretrained: The other fields of `Pretrained`.

    Raises:
        ValueError: `step` or `first` is out of its range, or `name` can be known to lead nowhere.
    """

    def __init__(self, name: str, step: int, first: int = 0, **pretrained: Any) -> None:
        super().__init__(name, **pretrained)
        if step < 1:
            raise ValueError(f"step is {step}: give at least 1; 2 keeps every other layer")
        if first < 0:
            raise ValueError(f"first is {first}: give the index of a layer, from 0")
        self.step = step
        self.first = first

    @override
    def build(self, request: BuildRequest) -> nn.Module:
        network = super().build(request)
        num_layers = len(blocks(network))
        if self.first >= num_layers:
            raise ValueError(f"first is {self.first}, and {self.name!r} has {num_layers} layers, counted from 0")
        return keep_layers(network, range(self.first, num_layers, self.step))
