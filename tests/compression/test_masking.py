from __future__ import annotations

import torch
from tiny_objective import objective
from torch import Tensor, nn

from lightllm.compression.effects import effective_layers
from lightllm.compression.masking import Masking, MaskingAndAdapting, mask_of, masks_of
from lightllm.models import TransformationKind


def test_masks_that_keep_everything_on_the_blocks_layers() -> None:
    network = objective().built_network
    before = {name: parameter.clone() for name, parameter in network.named_parameters()}
    masking = Masking("some name", ["down_proj"])
    assert masking.apply(network, None) is None
    layers = effective_layers(network)
    assert len(layers) == 12
    assert not any("down_proj" in name for name in layers)
    assert all(bool(layer.fixed_mask().keep.all()) for layer in layers.values())
    after = dict(network.named_parameters())
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], value) for name, value in before.items())
    assert (masking.name, masking.kind) == ("some name", TransformationKind.MASK)


def test_masks_come_with_the_state_dict() -> None:
    networks = [objective().built_network for _ in range(2)]
    for network in networks:
        Masking("M", []).apply(network, None)
    layers = [effective_layers(network) for network in networks]
    for name, layer in layers[0].items():
        layer.set_keep(torch.rand_like(layer.base.weight) > 0.5)
        assert not torch.equal(layer.fixed_mask().keep, layers[1][name].fixed_mask().keep)
    networks[1].load_state_dict(networks[0].state_dict())
    for name, layer in layers[0].items():
        assert torch.equal(layer.fixed_mask().keep, layers[1][name].fixed_mask().keep)


def test_who_adapts_weights_says_that_frozen_ones_change() -> None:
    assert not Masking("M", []).changes_frozen_weights
    assert MaskingAndAdapting("M", []).changes_frozen_weights


def test_masks_of_a_network_fixed_or_learned() -> None:
    network = objective().built_network
    Masking("M", ["down_proj"]).apply(network, None)
    first, second, *_ = effective_layers(network).values()
    keep = torch.rand_like(first.base.weight) > 0.5
    first.set_keep(keep)

    class Learned(nn.Module):
        def forward(self, weight: Tensor) -> Tensor:
            return weight * torch.where(torch.arange(weight.shape[1]) < 3, 0.0, 0.7)

    second.effect.masking = Learned()
    masks = masks_of(network)
    assert len(masks) == 12
    assert torch.equal(next(iter(masks.values())), keep)
    assert torch.equal(
        list(masks.values())[1], (torch.arange(second.base.in_features) >= 3).expand_as(second.base.weight)
    )
    second.effect.masking = None
    assert mask_of(second) is None
    assert len(masks_of(network)) == 11
