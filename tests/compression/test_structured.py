from __future__ import annotations

from copy import deepcopy

import pytest
import torch
from tiny_architectures import tiny_architecture
from tiny_networks import token_rows
from tiny_run import tiny_batches
from torch import Tensor
from transformers import PreTrainedModel

from lightllm.compression.structure import structure_of
from lightllm.compression.structured import prune
from lightllm.compression.structured_importance import Importance, norm_factors, scores
from lightllm.compression.structured_removal import remove
from lightllm.compression.structured_sizes import Removal
from lightllm.models.layer_removal import keep_layers

BATCHES = tiny_batches(3)
ALL = Removal(layers=2, heads=2, neurons=0.5, channels=8)


def network_of(architecture: str = "qwen3") -> PreTrainedModel:
    return tiny_architecture(architecture, num_hidden_layers=5, num_attention_heads=8, num_key_value_heads=4)


def highest(worth: Tensor, count: int) -> list[int]:
    """Their indices, ascending, by Python's own sorting."""
    values = worth.tolist()
    return sorted(sorted(range(len(values)), key=lambda index: -values[index])[:count])


@pytest.mark.parametrize("importance", ["activation", "taylor", "magnitude"])
def test_what_matters_least_goes(importance: Importance) -> None:
    network = network_of()
    smaller = deepcopy(network)
    kept = prune(smaller, ALL, importance, BATCHES)
    assert kept.layers.tolist() == highest(scores(structure_of(network), importance, BATCHES).layers, 3)
    # The rest is measured without them.
    shallow = keep_layers(deepcopy(network), kept.layers.tolist())
    found = scores(structure_of(shallow), importance, BATCHES)
    for layer in range(3):
        assert kept.heads[layer].tolist() == highest(found.heads[layer], 2)
        assert kept.neurons[layer].tolist() == highest(found.neurons[layer], 24)
    assert kept.channels.tolist() == highest(found.channels, 24)
    assert torch.equal(kept.norm_factors, norm_factors(structure_of(shallow), kept.channels, BATCHES).float())


@pytest.mark.parametrize("architecture", ["llama", "qwen2"])
def test_what_was_kept_makes_the_same_network_again(architecture: str) -> None:
    network = network_of(architecture)
    first, second = deepcopy(network), deepcopy(network)
    remove(second, prune(first, ALL, "activation", BATCHES))
    assert first.config.to_dict() == second.config.to_dict()
    assert all(map(torch.equal, first.state_dict().values(), second.state_dict().values()))
    tokens = token_rows(97)
    assert torch.equal(first(tokens).logits, second(tokens).logits)


def test_factors_bring_a_network_of_fewer_channels_nearer_to_the_whole() -> None:
    """A stream in which a few channels are large, as in trained networks: without them, the others would be too."""
    network = network_of("llama")
    network.model.embed_tokens.weight.data[:, :4] *= 12
    smaller, unscaled = deepcopy(network), deepcopy(network)
    kept = prune(smaller, Removal(channels=16), "activation", BATCHES)
    assert set(range(4)) <= set(kept.channels.tolist())
    assert (kept.norm_factors > 1.05).all()
    remove(unscaled, kept._replace(norm_factors=torch.ones(11)))
    tokens = token_rows(97)
    expected = network(tokens).logits.detach().log_softmax(-1)
    distances = [
        float((expected.exp() * (expected - one(tokens).logits.detach().log_softmax(-1))).sum(-1).mean())
        for one in (smaller, unscaled)
    ]
    assert distances[0] < distances[1]


def test_some_layers_stay_in_any_case() -> None:
    network = network_of()
    least = int(scores(structure_of(network), "activation", BATCHES).layers.argmin())
    kept = prune(network, Removal(layers=2), "activation", BATCHES, leave_out=[least, -1])
    assert {least, 4} <= set(kept.layers.tolist())
    assert kept.heads.tolist() == [[0, 1, 2, 3]] * 3  # and nothing else goes
    assert len(kept.channels) == 32
    with pytest.raises(ValueError, match="leave_out has layer 5, and the network has 5, counted from 0"):
        prune(network_of(), Removal(layers=2), "magnitude", [], leave_out=[5])
    with pytest.raises(ValueError, match="leave_out has 4 layers, and 3 are to stay"):
        prune(network_of(), Removal(layers=2), "magnitude", [], leave_out=[0, 1, 2, -1, 4])


def test_no_data_is_asked_for_where_none_is_needed() -> None:
    kept = prune(network_of(), ALL, "magnitude", [])
    assert torch.equal(kept.norm_factors, torch.ones(7))
    with pytest.raises(ValueError, match="importance by taylor is measured on data"):
        prune(network_of(), ALL, "taylor", [])
