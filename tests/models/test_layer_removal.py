from __future__ import annotations

import pytest
import torch
from tiny_architectures import tiny_architecture
from tiny_networks import token_rows
from transformers import AutoModelForCausalLM

from lightllm.models.anatomy import blocks
from lightllm.models.layer_removal import keep_layers


def test_layers_that_are_left_are_computed_one_after_the_other(tmp_path) -> None:
    network = tiny_architecture("llama", num_hidden_layers=4)
    states = network(tokens := token_rows(97), output_hidden_states=True).hidden_states
    assert keep_layers(network, [0, 1]) is network
    # In transformers' list, the last state is behind the final norm, the others are between the layers.
    torch.testing.assert_close(
        network(tokens, output_hidden_states=True).hidden_states[-1], network.model.norm(states[2])
    )
    network.save_pretrained(tmp_path / "saved")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "saved").eval()
    assert loaded.config.num_hidden_layers == len(blocks(loaded)) == 2
    torch.testing.assert_close(loaded(tokens, use_cache=False).logits, network(tokens).logits)


def test_what_the_configuration_says_of_each_layer_goes_with_it() -> None:
    types = ["sliding_attention", "full_attention", "sliding_attention", "full_attention"]
    network = tiny_architecture("gemma2", num_hidden_layers=4, layer_types=types)
    keep_layers(network, [0, 3])
    assert network.config.layer_types == ["sliding_attention", "full_attention"]
    gpt2 = keep_layers(tiny_architecture("gpt2"), [1])
    assert gpt2.config.n_layer == 1


def test_unlike_layers_are_refused() -> None:
    # The first layers of this one are dense, by number, and the others have experts.
    network = tiny_architecture("deepseek_v3", num_hidden_layers=3, first_k_dense_replace=1)
    with pytest.raises(ValueError, match="gives layers different parts by their number"):
        keep_layers(network, [1, 2])
