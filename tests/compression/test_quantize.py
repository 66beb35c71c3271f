from __future__ import annotations

from pathlib import Path
from typing import get_args

import pytest
import torch
from tiny_architectures import tiny_architecture
from tiny_networks import token_rows
from torch import Tensor, nn
from torchao.quantization import Int8Tensor, IntxUnpackedToInt8Tensor, quantize_
from transformers import AutoModelForCausalLM, PreTrainedModel

from lightllm.compression.fake_quantizer import LowBitWeight, to_low_bits
from lightllm.compression.grids import SymmetricGrid
from lightllm.compression.layers import prunable_layers
from lightllm.compression.quantize import is_stored, store_layers, stored_weight, torchao_config
from lightllm.compression.schemes import Scheme, SchemeName, make_scheme

SCHEMES = [make_scheme(name, 16 if "int4" in name else None) for name in get_args(SchemeName)] + [
    make_scheme("int8_weight_only", 16)
]


def llama() -> PreTrainedModel:
    torch.manual_seed(0)
    return tiny_architecture("llama", vocab_size=320, tie_word_embeddings=True)


def names(network: nn.Module) -> list[str]:
    return [name for name in prunable_layers(network) if "down_proj" not in name]


def rounded(network: nn.Module, scheme: Scheme) -> dict[str, LowBitWeight]:
    return {name: to_low_bits(network.get_submodule(name).weight, scheme.grid) for name in names(network)}


def logits(network: nn.Module) -> Tensor:
    with torch.no_grad():
        return network(token_rows()).logits


@pytest.mark.parametrize("scheme", SCHEMES, ids=lambda scheme: f"{scheme.name}-{scheme.grid.group_size}")
def test_torchaos_rounding_and_stored_integers_are_one_network_that_loads(scheme: Scheme, tmp_path: Path) -> None:
    original, ours, theirs = llama(), llama(), llama()
    weights = rounded(ours, scheme)
    store_layers(ours, scheme, weights)
    chosen = set(names(theirs))
    quantize_(theirs, torchao_config(scheme), filter_fn=lambda _, name: name in chosen)
    kind = IntxUnpackedToInt8Tensor if scheme.grid.bits == 4 else Int8Tensor
    for name in prunable_layers(original):
        layer = ours.get_submodule(name)
        if "down_proj" in name:
            assert torch.equal(layer.weight, original.get_submodule(name).weight)
            continue
        assert isinstance(layer.weight, kind)
        assert torch.equal(stored_weight(layer), weights[name].dense())
        assert torch.equal(stored_weight(layer), stored_weight(theirs.get_submodule(name)))
    expected = logits(theirs)
    assert torch.equal(logits(ours), expected)
    assert not torch.equal(logits(original), expected)
    ours.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(logits(loaded), expected)
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight
    assert [name for name, weight in loaded.named_parameters() if is_stored(weight)] == [
        f"{name}.weight" for name in names(original)
    ]


def test_scales_that_a_weight_does_not_have_itself_are_kept(tmp_path: Path) -> None:
    """As they are after GPTQ, or with frozen ranges; in float32 beside bfloat16."""
    network, scheme = llama(), make_scheme("int8_dynamic_int4", 16)
    for parameter in network.parameters():
        parameter.data = parameter.data.bfloat16()
    weights = {}
    for name in names(network):
        weight = network.get_submodule(name).weight.float()
        grid = SymmetricGrid(4, 16)
        weights[name] = to_low_bits(weight, grid, grid.scales(grid.groups(weight)) * 1.1)
    store_layers(network, scheme, weights)
    network.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    for name, weight in weights.items():
        stored = loaded.get_submodule(name).weight
        assert stored.dtype == torch.bfloat16
        assert torch.equal(stored.scale, weight.scales)
        assert torch.equal(stored.qdata, weight.integers)
    assert torch.equal(logits(loaded), logits(network))


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(ValueError, match="GGUF's numbers"):
        torchao_config(make_scheme("int4_weight_only", target="gguf"))
