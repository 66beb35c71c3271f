"""Architectures of transformers, built through `FromConfig` with two layers of width 32."""

from __future__ import annotations

import inspect
from typing import Any

from torch import nn
from transformers import CONFIG_MAPPING, PreTrainedModel

from lightllm.models import BuildRequest, FromConfig
from lightllm.models.network import Attention, Dtype

VOCABULARY = 97

SMALL: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "d_head": 8,
    "max_position_embeddings": 64,
    "n_inner": 48,
    "ffn_dim": 48,
    "rotary_dim": 8,
    "word_embed_proj_dim": 16,
    "num_local_experts": 4,
    "num_experts": 4,
    "moe_intermediate_size": 16,
    "num_experts_per_tok": 2,
    "vocab_size": VOCABULARY,
    "initializer_range": 0.3,
    "bos_token_id": 0,
    "eos_token_id": 0,
    "pad_token_id": 0,
}
"""Fields that make a network small, under the names that most configurations use or know as an alias."""

LATENT = {"qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8, "q_lora_rank": 16, "kv_lora_rank": 16}
"""Fields of architectures with multi-head latent attention, which have no one width of a head."""

PACKING = [
    *("codegen", "cohere", "cohere2", "deepseek_v3", "exaone4", "gemma", "gemma2", "gemma3_text", "glm4", "gpt2"),
    *("gpt_bigcode", "gpt_neox", "gptj", "granite", "helium", "llama", "llama4_text", "ministral", "mistral"),
    *("mixtral", "nemotron", "olmo2", "phi", "phi3", "qwen2", "qwen3", "qwen3_moe", "smollm3", "stablelm"),
    "starcoder2",
]
"""Causal architectures that keep packed documents apart."""

LEAKING = ["biogpt", "bloom", "falcon", "gpt_oss", "mamba", "mpt", "openai-gpt", "opt", "rwkv", "xglm"]
"""Causal architectures that do not, whatever positions they are given."""

ENCODERS = ["bert", "electra", "roberta", "xlnet"]
"""Architectures that transformers loads as causal models, and that see the whole row."""


def small_fields(architecture: str, **fields: Any) -> dict[str, Any]:
    """Those of `SMALL` that the architecture has, and `fields`."""
    config_class = CONFIG_MAPPING[architecture]
    known = {*inspect.signature(config_class.__init__).parameters, *config_class.attribute_map}
    small = {name: value for name, value in SMALL.items() if name in known}
    if "qk_rope_head_dim" in known:
        small = {name: value for name, value in small.items() if name != "head_dim"} | LATENT
        small |= {"num_key_value_heads": 4, "n_routed_experts": 4, "n_group": 2, "topk_group": 1}
    return small | fields


def tiny_architecture(
    architecture: str, attention: Attention = "by_document", dtype: Dtype = "float32", **fields: Any
) -> PreTrainedModel:
    """A causal network in evaluation mode, without a cache as the build pipeline leaves it."""
    network = FromConfig(architecture, small_fields(architecture, **fields), dtype, attention).build(
        BuildRequest("causal", None)
    )
    assert isinstance(network, PreTrainedModel)
    network.config.use_cache = False
    for name, parameter in network.named_parameters():
        if name.endswith("bias"):  # zeros would hide what is done to them
            nn.init.normal_(parameter, std=0.3)
    return network.eval()
