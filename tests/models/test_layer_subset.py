from __future__ import annotations

import pytest
import torch
from tiny_networks import tiny_llama, token_rows
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from lightllm.models import BuildRequest, EveryNthLayer
from lightllm.models.anatomy import blocks

REQUEST = BuildRequest("causal", None)


def deep_llama(num_layers: int = 7) -> LlamaForCausalLM:
    fields = tiny_llama().config.to_dict() | {"num_hidden_layers": num_layers}
    return LlamaForCausalLM(LlamaConfig(**fields)).eval()


@pytest.fixture
def folder(tmp_path) -> str:
    deep_llama().save_pretrained(tmp_path / "teacher")
    return str(tmp_path / "teacher")


@pytest.mark.parametrize(("step", "first", "kept"), [(3, 0, [0, 3, 6]), (3, 1, [1, 4]), (1, 0, list(range(7)))])
def test_layers_are_those_of_the_whole_network(folder: str, step: int, first: int, kept: list[int]) -> None:
    whole = AutoModelForCausalLM.from_pretrained(folder).eval()
    network = EveryNthLayer(folder, step, first, dtype="float32").build(REQUEST).eval()
    assert network.config.num_hidden_layers == len(blocks(network)) == len(kept)
    for layer, index in zip(blocks(network), kept, strict=True):
        for name, parameter in layer.named_parameters():
            assert torch.equal(parameter, whole.model.layers[index].get_parameter(name))
    # The layers by hand, one after the other.
    tokens = token_rows()
    hidden = whole.model.embed_tokens(tokens)
    positions = torch.arange(tokens.shape[1])[None]
    mask = torch.full((1, 1, tokens.shape[1], tokens.shape[1]), -torch.inf).triu(1)
    for index in kept:
        embeddings = whole.model.rotary_emb(hidden, positions)
        layer = whole.model.layers[index]
        hidden = layer(hidden, attention_mask=mask, position_ids=positions, position_embeddings=embeddings)
    expected = whole.lm_head(whole.model.norm(hidden))
    torch.testing.assert_close(network(tokens, use_cache=False).logits, expected, rtol=1e-4, atol=1e-4)


def test_cached_generation_and_a_saved_copy_agree(folder: str, tmp_path) -> None:
    """Indices that were left as they were would put keys and values in the wrong place of the cache."""
    network = EveryNthLayer(folder, 3, dtype="float32").build(REQUEST).eval()
    assert [layer.self_attn.layer_idx for layer in blocks(network)] == [0, 1, 2]
    tokens = token_rows()
    expected = network(tokens, use_cache=False).logits
    start = network(tokens[:, :5], use_cache=True)
    rest = network(tokens[:, 5:], past_key_values=start.past_key_values, use_cache=True).logits
    torch.testing.assert_close(rest, expected[:, 5:], rtol=1e-4, atol=1e-4)
    network.save_pretrained(tmp_path / "student")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "student").eval()
    assert loaded.config.num_hidden_layers == 3
    torch.testing.assert_close(loaded(tokens, use_cache=False).logits, expected)


def test_it_is_a_pretrained_network(folder: str) -> None:
    network = EveryNthLayer(folder, 2)
    assert network.tokenizer_source == folder
    assert network.restorable
    first, second = (network.build(REQUEST).state_dict() for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_what_is_refused(folder: str) -> None:
    with pytest.raises(ValueError, match="step is 0"):
        EveryNthLayer(folder, 0)
    with pytest.raises(ValueError, match="first is -1"):
        EveryNthLayer(folder, 2, -1)
    with pytest.raises(ValueError, match=r"first is 7, and .* has 7 layers"):
        EveryNthLayer(folder, 2, 7).build(REQUEST)
