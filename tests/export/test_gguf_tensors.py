from __future__ import annotations

import importlib.util
import itertools
from pathlib import Path

import numpy as np
import pytest
import torch
from fake_quantized import rounded_llama, switch_on, wide_llama
from tiny_networks import tiny_tokenizer, token_rows
from torch import nn
from transformers import AutoModelForCausalLM

from lightllm.compression.effects import effective_layers
from lightllm.compression.fake_quantizer import to_low_bits
from lightllm.compression.grids import Grid, Q4_0Grid, Q8_0Grid, SymmetricGrid
from lightllm.compression.schemes import SchemeName, make_scheme
from lightllm.export import GGUFType, write_gguf
from lightllm.export.compare import outputs
from lightllm.export.gguf_tensors import Stored, blocks, fitting, interleaved, is_exact, type_of
from lightllm.models.load import load_tokenizer, resolve_checkpoint

if importlib.util.find_spec("gguf") is None:
    pytest.skip("needs the package gguf", allow_module_level=True)


@pytest.mark.parametrize(("grid", "kind"), [(Q4_0Grid(), "Q4_0"), (Q8_0Grid(), "Q8_0")])
def test_blocks_of_ggufs_grids_are_the_packages_own_bytes(grid: Grid, kind: GGUFType) -> None:
    import gguf

    weight = torch.randn(6, 96)
    weight[0, :32] = 0
    low_bits = to_low_bits(weight, grid)
    assert type_of(low_bits) == kind
    assert np.array_equal(blocks(low_bits), gguf.quants.quantize(weight.numpy(), gguf.GGMLQuantizationType[kind]))


@pytest.mark.parametrize(
    ("grid", "kind"),
    [
        (SymmetricGrid(4, 32), "Q4_0"),
        (SymmetricGrid(4, 64), "Q4_0"),
        (SymmetricGrid(8), "Q8_0"),
        (SymmetricGrid(8, 64, float32_scales=True), "Q8_0"),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_blocks_of_torchaos_grids_hold_its_integers_and_its_scales_in_float16(
    grid: Grid, kind: GGUFType, dtype: torch.dtype
) -> None:
    import gguf

    low_bits = to_low_bits(torch.randn(6, 128).to(dtype), grid)
    assert fitting(low_bits, kind) is low_bits
    assert fitting(low_bits, "Q4_1") is None
    assert fitting(None, kind) is None
    read = gguf.quants.dequantize(blocks(low_bits), gguf.GGMLQuantizationType[kind])
    expected = low_bits._replace(scales=low_bits.scales.half().float()).dense()
    assert torch.equal(torch.from_numpy(read), expected)
    exact = torch.equal(expected, low_bits._replace(scales=low_bits.scales.float()).dense())
    assert is_exact(expected, Stored("", "", kind, low_bits)) == exact == (dtype == torch.bfloat16)


def test_groups_that_are_no_whole_blocks_do_not_fit() -> None:
    assert fitting(to_low_bits(torch.randn(4, 96), SymmetricGrid(4, 16)), "Q4_0") is None
    assert fitting(to_low_bits(torch.randn(4, 96), SymmetricGrid(4, 48)), "Q4_0") is None
    assert fitting(to_low_bits(torch.randn(4, 96), SymmetricGrid(4, 32)), "Q8_0") is None


def test_interleaving_pairs_a_heads_halves() -> None:
    rows = np.arange(8)[:, None]
    assert interleaved(rows, 2).flatten().tolist() == [0, 2, 1, 3, 4, 6, 5, 7]


@pytest.mark.parametrize("freeze", [False, True])
@pytest.mark.parametrize(("name", "kind"), [("int4_weight_only", "Q4_0"), ("int8_weight_only", "Q8_0")])
def test_what_was_trained_on_ggufs_grid_is_what_its_file_holds(
    name: SchemeName, kind: str, freeze: bool, tmp_path: Path
) -> None:
    network = rounded_llama(make_scheme(name, target="gguf"), freeze)
    report = write_gguf(network, tiny_tokenizer(), tmp_path / "net.gguf", embedding_dtype="F32")
    assert report.dtype == kind
    assert report.relative_logit_difference is not None
    assert report.relative_logit_difference < 1e-5
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="net.gguf", dtype=torch.float32)
    torch.testing.assert_close(outputs(loaded, token_rows()), outputs(network, token_rows()), rtol=1e-5, atol=1e-5)
    for layer_name, layer in effective_layers(network).items():
        assert torch.equal(loaded.get_submodule(layer_name).weight, layer.effective_weight())


@pytest.mark.parametrize(("name", "group_size"), [("int4_weight_only", 32), ("int8_weight_only", None)])
def test_what_was_trained_on_torchaos_grid_loses_only_the_last_bits_of_its_scales(
    name: SchemeName, group_size: int | None, tmp_path: Path
) -> None:
    network = rounded_llama(make_scheme(name, group_size))
    write_gguf(network, tiny_tokenizer(), tmp_path / "net.gguf")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="net.gguf", dtype=torch.float32)
    for layer_name, layer in effective_layers(network).items():
        torch.testing.assert_close(
            loaded.get_submodule(layer_name).weight, layer.effective_weight(), rtol=2**-11, atol=0.0
        )


def test_two_schemes_are_two_types_of_one_file_and_the_embedding_stays_in_16_bits(tmp_path: Path) -> None:
    from gguf import GGUFReader

    network = wide_llama()
    left_out: dict[SchemeName, list[str]] = {"int4_weight_only": ["self_attn"], "int8_weight_only": ["mlp", "o_proj"]}
    for name, patterns in left_out.items():
        switch_on(network, make_scheme(name, target="gguf"), patterns)
    write_gguf(network, tiny_tokenizer(), tmp_path / "net.gguf")
    kinds = {tensor.name: tensor.tensor_type.name for tensor in GGUFReader(tmp_path / "net.gguf").tensors}
    assert kinds["token_embd.weight"] == kinds["blk.0.attn_output.weight"] == "F16"
    assert kinds["blk.0.ffn_up.weight"] == "Q4_0"
    assert kinds["blk.0.attn_q.weight"] == "Q8_0"


def test_dynamic_inputs_are_no_part_of_a_file(tmp_path: Path) -> None:
    report = write_gguf(
        rounded_llama(make_scheme("int8_dynamic_int4", target="gguf")), tiny_tokenizer(), tmp_path / "net.gguf"
    )
    assert report.relative_logit_difference is not None
    assert 1e-5 < report.relative_logit_difference < 0.1


@pytest.mark.real_model
@pytest.mark.skipif(importlib.util.find_spec("llama_cpp") is None, reason="needs llama-cpp-python")
@pytest.mark.parametrize(("name", "kind"), [("int8_dynamic_int4", "Q4_0"), ("int8_dynamic_int8", "Q8_0")])
def test_llama_cpp_answers_as_the_fake_quantized_network_does(name: SchemeName, kind: str, tmp_path: Path) -> None:
    """Which rounds activations as llama.cpp does, in blocks of Q8_0."""
    from llama_cpp import Llama

    model = "smollm2-135m-instruct"
    tokenizer = load_tokenizer(model)
    network: nn.Module = AutoModelForCausalLM.from_pretrained(resolve_checkpoint(model), dtype=torch.float32)
    switch_on(network, make_scheme(name, target="gguf"))
    report = write_gguf(network, tokenizer, tmp_path / "net.gguf")
    assert report.dtype == kind
    llama = Llama(str(tmp_path / "net.gguf"), n_ctx=256, verbose=False)
    for question in ("What is the capital of France?", "Name three colours.", "What does print do in Python?"):
        chat = [{"role": "user", "content": question}]
        prompt = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=True)["input_ids"]
        answer = list(itertools.islice(llama.generate(prompt, temp=0.0), 16))
        assert most_regret(network, prompt, answer) < 0.5


def most_regret(network: nn.Module, prompt: list[int], answer: list[int]) -> float:
    """How far the network's logit of any of the answer's tokens is below that of its own choice.

    SmolLM2's first choice is sometimes by a tenth of a logit only, which sums in another order turn over: two programs
    with the same numbers need not say the same words, but neither says what the other finds unlikely.
    """
    with torch.no_grad():
        logits = network(torch.tensor([prompt + answer])).logits[0, len(prompt) - 1 : -1]
    chosen = logits.gather(1, torch.tensor(answer)[:, None])[:, 0]
    return float((logits.amax(1) - chosen).max())
