from __future__ import annotations

from typing import Any

import pytest
import torch
from own_networks import Gru, Transformer
from tiny_architectures import ENCODERS, LEAKING, PACKING, VOCABULARY, tiny_architecture
from tiny_networks import tiny_llama
from torch import Tensor, nn

from lightllm.batch import Document, TextBatch, pack_documents
from lightllm.models import LoRA
from lightllm.models.anatomy import OwnNetwork, decoder, input_embedding
from lightllm.models.hidden_states import check_causal, check_packing, hidden_states
from lightllm.modules.build import checkpoint_gradients

LENGTHS = [[5, 9, 2], [12], [1, 7]]
"""Positions of the documents of three rows; the first row is full, the others end in padding."""


def documents() -> list[list[Document]]:
    generator = torch.Generator().manual_seed(2)
    return [
        [
            Document(torch.randint(VOCABULARY, (length + 1,), generator=generator), [True] * (length + 1), 7)
            for length in row
        ]
        for row in LENGTHS
    ]


def packed_pass(network: nn.Module) -> list[Tensor]:
    """Hidden states of each document, `[positions, hidden]`, from packed rows."""
    batch = pack_documents(documents())
    hidden = hidden_states(network, batch)
    assert hidden.shape == (3, 16, hidden.shape[-1])
    return [part for row, lengths in zip(hidden, LENGTHS, strict=True) for part in row[: sum(lengths)].split(lengths)]


def separate_passes(network: nn.Module) -> list[Tensor]:
    """The same from transformers' own call, one document after another, with nothing said about positions."""
    ids = [torch.as_tensor(document.input_ids)[None, :-1] for row in documents() for document in row]
    return [decoder(network)(input_ids=row, use_cache=False).last_hidden_state[0] for row in ids]


def gradients(network: nn.Module, parts: list[Tensor]) -> list[Tensor]:
    weights = torch.randn(parts[0].shape[-1], generator=torch.Generator().manual_seed(3))
    network.zero_grad()
    sum((part.float() * weights).tanh().sum() for part in parts).backward()  # type: ignore[union-attr]
    return [parameter.grad for parameter in network.parameters() if parameter.grad is not None]


def assert_same(ours: list[Tensor], expected: list[Tensor], tolerance: float) -> None:
    assert len(ours) == len(expected) > 0
    scale = max(float(one.detach().abs().max()) for one in expected)
    for one, other in zip(ours, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=tolerance * scale)


def compare(network: nn.Module, tolerance: float = 1e-5) -> None:
    packed = packed_pass(network)
    packed_gradients = [gradient.clone() for gradient in gradients(network, packed)]
    separate = separate_passes(network)
    assert_same(packed, separate, tolerance)
    assert_same(packed_gradients, gradients(network, separate), tolerance)


@pytest.mark.parametrize("name", PACKING)
def test_packed_is_separate(name: str) -> None:
    compare(tiny_architecture(name), tolerance=1e-4)  # some have large gradients


VARIANTS: dict[str, dict[str, Any]] = {
    "llama": {},
    "qwen2": {},
    "qwen3": {},
    "gpt2": {},
    "gemma2": {"sliding_window": 3, "attn_logit_softcapping": 1.0, "final_logit_softcapping": 2.0},
    "mistral": {"sliding_window": 3},
}


@pytest.mark.parametrize("attention", ["by_document", "sdpa", "eager"])
@pytest.mark.parametrize("name", VARIANTS)
def test_packed_is_separate_by_every_attention(name: str, attention: Any) -> None:
    if (name, attention) == ("gemma2", "sdpa"):
        with pytest.raises(ValueError, match="Gemma2ForCausalLM does not support"):
            tiny_architecture(name, attention, **VARIANTS[name])
    else:
        compare(tiny_architecture(name, attention, **VARIANTS[name]))


@pytest.mark.parametrize("name", VARIANTS)
def test_packed_is_separate_with_gradient_checkpointing(name: str) -> None:
    network = tiny_architecture(name, **VARIANTS[name])
    for module in network.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    checkpoint_gradients(network)
    compare(network.train())


@pytest.mark.parametrize("name", VARIANTS)
@pytest.mark.parametrize("autocast", [False, True])
def test_packed_is_separate_in_bfloat16(name: str, autocast: bool) -> None:
    network = tiny_architecture(name, dtype="float32" if autocast else "bfloat16", **VARIANTS[name])
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        assert_same(packed_pass(network), separate_passes(network), 0.06)


def test_packed_is_separate_through_an_adapter() -> None:
    network = LoRA(rank=4).attach(tiny_llama(VOCABULARY))
    for name, parameter in network.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.05)
    compare(network)


def test_own_networks_get_ids_and_positions() -> None:
    network = OwnNetwork(Transformer(VOCABULARY), "lm_head")
    ours = packed_pass(network)
    rows = [torch.as_tensor(document.input_ids)[None, :-1] for row in documents() for document in row]
    expected = [network.module(row, torch.arange(row.shape[1])[None])[0] for row in rows]
    assert_same(ours, expected, 1e-5)


@pytest.mark.parametrize("name", LEAKING)
def test_networks_whose_packed_documents_see_each_other_are_refused(name: str) -> None:
    network = tiny_architecture(name)
    check_causal(network)
    with pytest.raises(ValueError, match=f"{type(network).__name__} does not tell packed documents apart"):
        check_packing(network)
    with torch.no_grad(), pytest.raises(AssertionError, match="not close"):  # and they do see each other
        assert_same(packed_pass(network), separate_passes(network), 1e-4)


@pytest.mark.parametrize("name", PACKING)
def test_networks_that_pack_are_let_through(name: str) -> None:
    network = tiny_architecture(name)
    check_causal(network)
    check_packing(network)


def test_own_networks_are_checked_too() -> None:
    check_causal(OwnNetwork(Gru(9), "out"))
    check_packing(OwnNetwork(Transformer(9), "lm_head"))
    with pytest.raises(ValueError, match=r"OwnNetwork does not tell .* set data.batches.mode to sorted"):
        check_packing(OwnNetwork(Gru(9), "out"))


@pytest.mark.parametrize("name", ENCODERS)
def test_networks_that_see_ahead_are_refused(name: str) -> None:
    with pytest.raises(ValueError, match=r"sees the tokens that it is to predict: it is an encoder"):
        check_causal(tiny_architecture(name))


def test_an_encoder_made_a_decoder_is_causal() -> None:
    check_causal(tiny_architecture("bert", is_decoder=True))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_leak_is_found_however_weak(dtype: Any) -> None:
    with pytest.raises(ValueError, match="packed documents"):
        check_packing(tiny_architecture("opt", dtype=dtype, init_std=1e-3))


def test_the_checks_leave_no_trace() -> None:
    network = tiny_llama().train()
    state = torch.get_rng_state()
    check_causal(network)
    check_packing(network)
    assert torch.equal(state, torch.get_rng_state())
    assert network.training
    assert all(parameter.grad is None for parameter in network.parameters())
    assert not input_embedding(network)._forward_hooks


def test_the_whole_row_is_given_back() -> None:
    batch: TextBatch = pack_documents(documents(), length=20)
    assert hidden_states(tiny_llama(VOCABULARY), batch).shape == (3, 20, 32)
