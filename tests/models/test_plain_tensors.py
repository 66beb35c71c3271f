from __future__ import annotations

import torch
from tiny_networks import tiny_llama
from torch import Tensor, nn

from lightllm.export.merge import merged_weights
from lightllm.models.plain_tensors import StandsForPlain


class Doubled(nn.Module, StandsForPlain):
    """Stands for a linear layer of twice its weight."""

    def __init__(self, inner: nn.Linear) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, inputs: Tensor) -> Tensor:
        return 2 * self.inner(inputs)

    def plain_tensors(self) -> dict[str, Tensor]:
        return {"weight": 2 * self.inner.weight.detach()}


def test_an_export_writes_what_a_layer_stands_for() -> None:
    network = tiny_llama()
    projection = network.model.layers[0].mlp.up_proj
    assert isinstance(projection, nn.Linear)
    expected = dict(merged_weights(network)) | {"model.layers.0.mlp.up_proj.weight": 2 * projection.weight.detach()}
    network.model.layers[0].mlp.up_proj = Doubled(projection)
    found = dict(merged_weights(network))
    assert list(found) == list(expected)
    assert all(torch.equal(found[name], expected[name]) for name in expected)
