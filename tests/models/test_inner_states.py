from __future__ import annotations

import pytest
import torch
from peft import LoraConfig, get_peft_model
from tiny_architectures import tiny_architecture
from tiny_networks import tiny_llama, token_rows
from torch import nn

from lightllm.models.inner_states import inner_states, layer_index
from lightllm.modules.build import checkpoint_gradients


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "gemma2"])
def test_hidden_states_are_transformers_own(architecture: str) -> None:
    network = tiny_architecture(architecture).eval()
    tokens = token_rows(vocab=97)
    expected = network(tokens, output_hidden_states=True).hidden_states
    with inner_states(network, layers=[0, 1, 2]) as states:
        network(tokens)
    # transformers' last one has gone through the final norm, and the embeddings of some are scaled or added to
    torch.testing.assert_close(states.hidden[1], expected[1])
    assert not states.hidden[2].equal(states.hidden[1])
    assert torch.equal(states.hidden[0], network.get_input_embeddings()(tokens))
    if architecture == "llama":
        torch.testing.assert_close(states.hidden[0], expected[0])
        torch.testing.assert_close(network.model.norm(states.hidden[2]), expected[2])


def test_vectors_with_an_adapter() -> None:
    network = get_peft_model(tiny_llama(), LoraConfig(target_modules=["q_proj"], task_type="CAUSAL_LM"))
    base = network.get_base_model()
    tokens = token_rows()
    with inner_states(network, [1], [(2, "query"), (2, "value")]) as states:
        network(tokens)
    block = base.model.layers[1]
    normed = block.input_layernorm(states.hidden[1])
    torch.testing.assert_close(states.vectors[2, "query"], block.self_attn.q_proj(normed))
    torch.testing.assert_close(states.vectors[2, "value"], block.self_attn.v_proj(normed))


@pytest.mark.parametrize("checkpointing", [False, True])
def test_gradients_flow_and_no_hook_stays(checkpointing: bool) -> None:
    network = tiny_llama().train()
    if checkpointing:
        checkpoint_gradients(network)
    with inner_states(network, [1], [(2, "key")]) as states:
        network(token_rows(), use_cache=False)
    assert not any(module._forward_hooks for module in network.modules() if isinstance(module, (nn.Linear,)))
    assert not network.model.layers[0]._forward_hooks
    (states.hidden[1].square().sum() + states.vectors[2, "key"].square().sum()).backward()
    gradient = network.model.layers[0].mlp.down_proj.weight.grad
    assert gradient is not None
    assert gradient.abs().sum() > 0
    assert network.model.layers[1].self_attn.k_proj.weight.grad.abs().sum() > 0
    assert network.model.layers[1].self_attn.v_proj.weight.grad is None


def test_layers_by_number() -> None:
    network = tiny_llama()
    assert [layer_index(network, layer) for layer in (0, 1, 2, -1, -2, -3)] == [0, 1, 2, 2, 1, 0]
    with pytest.raises(ValueError, match="no layer 3 in LlamaForCausalLM: 0 is its embedding, 2 its last block"):
        layer_index(network, 3)
    with (
        pytest.raises(ValueError, match="layer 1 of GPT2LMHeadModel has no one layer named q_proj or query"),
        inner_states(tiny_architecture("gpt2"), vectors=[(1, "query")]),
    ):
        pass
