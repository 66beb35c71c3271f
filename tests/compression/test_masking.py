from __future__ import annotations

import torch
from tiny_objective import objective

from lightllm.compression.effects import effective_layers
from lightllm.compression.masking import Masking, MaskingAndAdapting
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
