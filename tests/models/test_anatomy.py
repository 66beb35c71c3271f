from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from own_networks import Gru
from peft import LoraConfig, PromptTuningConfig, get_peft_model
from tiny_architectures import LEAKING, PACKING, tiny_architecture
from tiny_encoders import tiny_encoder
from tiny_networks import tiny_gpt2, tiny_llama, tiny_qwen2, token_rows
from torch import Tensor, nn
from transformers import PreTrainedModel

from lightllm.models.anatomy import (
    OwnNetwork,
    adapter_switched_off,
    apply_head,
    blocks,
    check_head,
    decoder,
    first_position,
    has_adapter,
    input_embedding,
    learns_a_prompt,
    max_positions,
    output_head,
    output_layer,
    transformers_network,
    unwrapped,
    vocabulary_size,
)


def adapted(network: nn.Module, configuration: Any) -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        return get_peft_model(network, configuration)  # type: ignore[arg-type]


def logits_of(network: PreTrainedModel, input_ids: Tensor) -> tuple[Tensor, Tensor]:
    """What the network says, and what its parts say."""
    with torch.no_grad():
        hidden = decoder(network)(input_ids=input_ids, use_cache=False).last_hidden_state
        return network(input_ids=input_ids, use_cache=False).logits, apply_head(hidden, output_head(network))


SCALED: dict[str, dict[str, Any]] = {
    "cohere": {"logit_scale": 0.25},
    "granite": {"logits_scaling": 8.0},
    "gemma2": {"final_logit_softcapping": 2.0},
    "phi": {},
    "recurrent_gemma": {"logits_soft_cap": 2.0, "lru_width": 32},
    "gpt2": {"tie_word_embeddings": False},
}


@pytest.mark.parametrize("name", [*PACKING, *LEAKING])
def test_head_and_blocks_of_an_architecture(name: str) -> None:
    network = tiny_architecture(name)
    check_head(network)
    expected, logits = logits_of(network, token_rows(97, rows=2, length=9))
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)
    assert len(blocks(network)) == 2
    assert input_embedding(network) is network.get_input_embeddings()
    assert vocabulary_size(network) == 97


@pytest.mark.parametrize("name", SCALED)
def test_what_comes_after_the_product(name: str) -> None:
    network = tiny_architecture(name, **SCALED[name])
    expected, logits = logits_of(network, token_rows(97, rows=2, length=9))
    torch.testing.assert_close(logits, expected, rtol=1e-5, atol=1e-5)
    head = output_head(network)
    plain = torch.nn.functional.linear(torch.ones(32), head.weight)
    assert name in ("phi", "gpt2") or not torch.allclose(apply_head(torch.ones(32), head), plain)
    assert (head.bias is not None) == (name == "phi")
    assert (head.weight is input_embedding(network).weight) == network.config.tie_word_embeddings


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_wrong_scale_is_noticed_however_small_the_logits(dtype: Any) -> None:
    network = tiny_architecture("granite", dtype=dtype, logits_scaling=1.0, initializer_range=0.02)
    check_head(network)
    network.config.logits_scaling = 1.0
    network.lm_head.register_forward_hook(lambda _, __, logits: logits * 1.1)
    with pytest.raises(ValueError, match="GraniteForCausalLM makes its logits in a way"):
        check_head(network)
    assert not network.training


@pytest.mark.parametrize("name", ["modernbert-decoder", "inkling_text"])
def test_heads_that_are_more_than_a_matrix_are_refused(name: str) -> None:
    with pytest.raises(ValueError, match="makes its logits in a way that lightllm does not know"):
        check_head(tiny_architecture(name))


def test_check_head_leaves_the_modes_as_they_were() -> None:
    network = tiny_llama().train()
    network.model.layers[1].eval()
    check_head(network)
    assert network.training
    assert network.model.layers[0].training
    assert not network.model.layers[1].training


def test_blocks_of_a_hybrid_are_its_layers_though_of_two_classes() -> None:
    network = tiny_architecture("jamba", attn_layer_offset=1, attn_layer_period=2)
    stack = blocks(network)
    assert len(stack) == 2
    assert len({type(block) for block in stack}) == 2


def test_blocks_of_experts_are_the_layers() -> None:
    class Mixture(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.experts = nn.ModuleList([nn.Linear(8, 8) for _ in range(9)])

    module = Gru(11)
    module.layers = nn.ModuleList([Mixture(), Mixture()])
    network = OwnNetwork(module, "out")
    assert blocks(network) is module.layers
    module.layers = nn.ModuleList()
    with pytest.raises(ValueError, match="OwnNetwork has no stack of layers"):
        blocks(network)


def test_own_network_names_its_head() -> None:
    module = Gru(11)
    network = OwnNetwork(module, "out")
    head = output_head(network)
    assert head.weight is module.out.weight
    assert head.bias is module.out.bias
    assert (head.softcap, head.logit_scale) == (None, 1.0)
    assert input_embedding(network) is module.tokens
    assert vocabulary_size(network) == 11
    assert max_positions(network) is None
    assert decoder(network) is module
    assert not learns_a_prompt(network)
    assert not has_adapter(network)
    check_head(network)
    with pytest.raises(ValueError, match="OwnNetwork is not one"):
        transformers_network(network)
    with pytest.raises(ValueError, match=r"Gru has no module 'head' for its head; its linear layers are \['out'\]"):
        OwnNetwork(module, "head")
    with pytest.raises(ValueError, match="the head 'tokens' of Gru is a Embedding, not"):
        OwnNetwork(module, "tokens")


def test_through_an_adapter_the_network_is_found() -> None:
    base = tiny_qwen2()
    network = adapted(base, LoraConfig(target_modules="all-linear", task_type="CAUSAL_LM"))
    assert unwrapped(network) is base
    assert transformers_network(network) is base
    assert decoder(network) is base.model
    assert blocks(network) is base.model.layers
    assert output_head(network).weight is base.lm_head.weight
    assert has_adapter(network)
    assert not learns_a_prompt(network)


def test_a_trained_copy_counts_until_the_adapter_is_off() -> None:
    base = tiny_llama(tied=False)
    network = adapted(base, LoraConfig(target_modules=["q_proj"], modules_to_save=["lm_head", "embed_tokens"]))
    original, copy = base.lm_head.original_module, base.lm_head.modules_to_save["default"]
    assert output_head(network).weight is copy.weight
    assert input_embedding(network) is base.model.embed_tokens.modules_to_save["default"]
    with adapter_switched_off(network):
        assert output_head(network).weight is original.weight
        assert input_embedding(network) is base.model.embed_tokens.original_module
    assert output_head(network).weight is copy.weight
    with pytest.raises(ValueError, match="no adapter that could be switched off"):
        adapter_switched_off(base)


def test_a_low_rank_update_of_the_head_is_refused_and_of_the_embedding_is_not() -> None:
    base = tiny_llama(tied=False)
    network = adapted(base, LoraConfig(target_modules=["q_proj", "lm_head", "embed_tokens"]))
    with pytest.raises(ValueError, match=r"targets include the output head.*name it in modules_to_save"):
        output_head(network)
    assert input_embedding(network) is base.model.embed_tokens.base_layer


def test_positions_begin_behind_the_entry_for_padding() -> None:
    roberta = tiny_encoder("roberta", max_position_embeddings=64)
    assert first_position(roberta) == 2
    assert max_positions(roberta) == 62
    assert first_position(tiny_encoder("bert")) == first_position(tiny_llama()) == 0


def test_output_layer_is_what_head_is_read_from() -> None:
    network = tiny_encoder("bert")
    layer = output_layer(network)
    assert layer is network.cls.predictions.decoder
    assert output_head(network).weight is layer.weight
    assert output_layer(tiny_encoder("bert", task="encoder")) is None


def test_positions_are_shared_with_a_learned_prompt() -> None:
    assert max_positions(tiny_gpt2()) == 96
    network = adapted(tiny_gpt2(), PromptTuningConfig(num_virtual_tokens=6, task_type="CAUSAL_LM"))
    assert learns_a_prompt(network)
    assert max_positions(network) == 90
    with adapter_switched_off(network):
        assert not learns_a_prompt(network)
        assert max_positions(network) == 96


def test_an_encoder_has_no_head() -> None:
    with pytest.raises(ValueError, match="LlamaModel has no head"):
        output_head(tiny_llama().model)
