from __future__ import annotations

from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_architectures import tiny_architecture
from tiny_networks import token_rows
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from lightllm.compression.structure import structure_of
from lightllm.compression.structured_removal import Kept, everything, remove
from lightllm.models.layer_removal import keep_layers

BIASES: dict[str, dict[str, Any]] = {
    "llama": {"attention_bias": True, "mlp_bias": True},
    "qwen3": {"attention_bias": True},
}
KNOWN = ["llama", "mistral", "qwen2", "qwen3"]
TOKENS = token_rows(97)


def network_of(architecture: str, tied: bool = True, **fields: Any) -> PreTrainedModel:
    fields = {"num_hidden_layers": 3, "num_attention_heads": 8, "num_key_value_heads": 4} | fields
    fields |= {} if architecture == "qwen2" else {"head_dim": 6}  # which qwen2 does not declare
    return tiny_architecture(architecture, **fields, **BIASES.get(architecture, {}), tie_word_embeddings=tied)


def some(count: int, of: int, rows: int) -> Tensor:
    """Other indices in every row, ascending."""
    chosen = [torch.randperm(of, generator=torch.Generator().manual_seed(row))[:count] for row in range(rows)]
    return torch.stack(chosen).sort().values.int()


def pruned(network: PreTrainedModel, **kept: Tensor) -> PreTrainedModel:
    smaller = deepcopy(network)
    remove(smaller, everything(structure_of(network))._replace(**kept))
    return smaller


def logits(network: PreTrainedModel) -> Tensor:
    return network(TOKENS, use_cache=False).logits.detach()


def assert_same(ours: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max()))


@pytest.mark.parametrize("architecture", KNOWN)
def test_without_heads_is_as_with_heads_that_add_nothing(architecture: str) -> None:
    network = network_of(architecture)
    heads = some(2, 4, 3)
    smaller = pruned(network, heads=heads)
    for layer, kept in zip(network.model.layers, heads.tolist(), strict=True):
        columns = layer.self_attn.o_proj.weight.data.unflatten(1, (4, -1))  # two query heads to each of 4
        columns[:, [head for head in range(4) if head not in kept]] = 0
    assert_same(logits(smaller), logits(network))
    config = smaller.config
    head_dim = structure_of(network).head_dim
    assert (config.num_attention_heads, config.num_key_value_heads, config.head_dim) == (4, 2, head_dim)


@pytest.mark.parametrize("architecture", KNOWN)
def test_without_neurons_is_as_with_neurons_that_add_nothing(architecture: str) -> None:
    network = network_of(architecture)
    neurons = some(31, 48, 3)
    smaller = pruned(network, neurons=neurons)
    for layer, kept in zip(network.model.layers, neurons.tolist(), strict=True):
        layer.mlp.down_proj.weight.data[:, [one for one in range(48) if one not in kept]] = 0
    assert_same(logits(smaller), logits(network))
    assert smaller.config.intermediate_size == 31


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("architecture", KNOWN)
def test_without_channels_is_as_with_channels_that_stay_zero(architecture: str, tied: bool) -> None:
    network = network_of(architecture, tied, rms_norm_eps=0.0)
    channels = some(24, 32, 1)[0]
    # Where the others are zero, the mean square over all channels is 24/32 of that over those that stay.
    smaller = pruned(network, channels=channels, norm_factors=torch.full((7,), (32 / 24) ** 0.5))
    gone = [one for one in range(32) if one not in channels.tolist()]
    network.model.embed_tokens.weight.data[:, gone] = 0
    for layer in network.model.layers:
        for output in (layer.self_attn.o_proj, layer.mlp.down_proj):
            output.weight.data[gone] = 0
            if output.bias is not None:
                output.bias.data[gone] = 0
    assert_same(logits(smaller), logits(network))
    assert smaller.config.hidden_size == 24
    assert (smaller.lm_head.weight is smaller.model.embed_tokens.weight) == tied


def test_without_layers_is_what_keep_layers_leaves() -> None:
    network = network_of("qwen3")
    every = everything(structure_of(network))
    smaller = pruned(
        network,
        layers=torch.tensor([0, 2]),
        heads=every.heads[:2],
        neurons=every.neurons[:2],
        norm_factors=torch.ones(5),
    )
    assert torch.equal(logits(smaller), logits(keep_layers(network, [0, 2])))


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("architecture", KNOWN)
def test_all_at_once_loads_in_transformers_and_generates_with_a_cache(
    architecture: str, tied: bool, tmp_path: Path
) -> None:
    network = network_of(architecture, tied).requires_grad_(False)
    network.lm_head.weight.requires_grad_(True)
    kept = Kept(torch.tensor([0, 2]), some(2, 4, 2), some(20, 48, 2), some(20, 32, 1)[0], torch.full((5,), 1.1))
    remove(network, kept)
    assert [name for name, one in network.named_parameters() if one.requires_grad] == [
        "model.embed_tokens.weight" if tied else "lm_head.weight"
    ]
    network.save_pretrained(tmp_path / "saved")
    loaded, report = AutoModelForCausalLM.from_pretrained(tmp_path / "saved", output_loading_info=True)
    assert not any(report.values())
    config = loaded.config
    assert (config.num_hidden_layers, config.num_attention_heads, config.num_key_value_heads) == (2, 4, 2)
    assert (config.intermediate_size, config.hidden_size) == (20, 20)
    assert sum(one.numel() for one in loaded.parameters()) == sum(one.numel() for one in network.parameters())
    assert torch.equal(logits(loaded.eval()), logits(network))
    again = type(network)(config)  # and a network from scratch is of this shape
    assert {name: one.shape for name, one in again.named_parameters()} == {
        name: one.shape for name, one in network.named_parameters()
    }
    for module in network.modules():
        if isinstance(module, torch.nn.Linear):
            assert module.weight.shape == (module.out_features, module.in_features)
    network.config.use_cache = True
    row = TOKENS[:1, :5]
    fields = {"do_sample": False, "max_new_tokens": 8, "pad_token_id": 0, "eos_token_id": None}
    generated = network.generate(row, attention_mask=torch.ones_like(row), **fields)
    for _ in range(8):
        row = torch.cat([row, network(row, use_cache=False).logits[:, -1:].argmax(-1)], 1)
    assert torch.equal(generated, row)


def test_all_of_it_changes_nothing() -> None:
    network = network_of("qwen3")
    assert torch.equal(logits(pruned(network)), logits(network))


def test_the_weights_of_the_whole_network_are_not_kept_alive() -> None:
    network = network_of("llama")
    smaller = pruned(network, neurons=some(4, 48, 3))
    for parameter in smaller.parameters():
        assert parameter.untyped_storage().nbytes() == parameter.numel() * parameter.element_size()


def test_indices_of_another_network_are_refused() -> None:
    network = network_of("llama")
    kept = everything(structure_of(network))
    with pytest.raises(ValueError, match="neurons that were kept are not those of this network, which has 40"):
        remove(network_of("llama", intermediate_size=40), kept)
