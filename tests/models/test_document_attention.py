from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_architectures import tiny_architecture
from tiny_networks import token_rows
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    BertForMaskedLM,
    FalconForCausalLM,
    Gemma2ForCausalLM,
    GptOssForCausalLM,
    LlamaForCausalLM,
)
from transformers.masking_utils import causal_mask_function, create_causal_mask, sliding_window_causal_mask_function

from lightllm.models import document_attention
from lightllm.models.document_attention import (
    BY_DOCUMENT,
    attention_by_document,
    document_lengths_or_mask,
    implementation_for,
)
from lightllm.models.hidden_states import hidden_states
from lightllm.models.inference import inference

HEADS = 4


def states(batch: int, length: int, key_value_heads: int = HEADS) -> list[Tensor]:
    return [
        torch.randn(batch, heads, length, 8, dtype=torch.float64, requires_grad=True)
        for heads in (HEADS, key_value_heads, key_value_heads)
    ]


def by_hand(query: Tensor, key: Tensor, value: Tensor, document: Tensor, scale: float) -> Tensor:
    """Softmax attention over the whole row, masked: `[batch, seq, heads, head_dim]`; `document` is `[batch, seq]`."""
    groups = HEADS // key.shape[1]
    key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    length = query.shape[2]
    seen = (document[:, None, :, None] == document[:, None, None, :]) & torch.ones(length, length).tril().bool()
    scores = (query @ key.transpose(-1, -2) * scale).masked_fill(~seen, -torch.inf)
    return (scores.softmax(-1) @ value).transpose(1, 2)


@pytest.mark.parametrize("key_value_heads", [1, 2, 4])
def test_attention_is_that_of_a_masked_row(key_value_heads: int) -> None:
    document = torch.tensor([[0, 0, 0, 1, 2, 2], [3, 3, 3, 3, 3, 3]])
    tensors = states(2, 6, key_value_heads)
    expected = by_hand(*tensors, document, scale=0.7)
    output, weights = attention_by_document(nn.Identity(), *tensors, torch.tensor([3, 1, 2, 6]), scaling=0.7)
    assert weights is None
    torch.testing.assert_close(output, expected)
    direction = torch.randn_like(output)
    ours = torch.autograd.grad(output, tensors, direction)
    for one, other in zip(ours, torch.autograd.grad(expected, tensors, direction), strict=True):
        torch.testing.assert_close(one, other)


def test_dropout_is_applied() -> None:
    tensors = states(1, 6)
    plain, _ = attention_by_document(nn.Identity(), *tensors, torch.tensor([4, 2]), scaling=0.3, dropout=0.0)
    dropped, _ = attention_by_document(nn.Identity(), *tensors, torch.tensor([4, 2]), scaling=0.3, dropout=0.5)
    assert not torch.allclose(plain, dropped)


@pytest.mark.parametrize("asked", ["softcap", "s_aux", "position_bias"])
@pytest.mark.parametrize("mask", [None, torch.tensor([4, 2])])
def test_what_sdpa_cannot_do_is_not_left_out_silently(asked: str, mask: Tensor | None) -> None:
    module = nn.Identity()
    module.is_causal = True  # type: ignore[assignment]
    attention_by_document(module, *states(1, 6), mask, scaling=0.3, **{asked: None})
    with pytest.raises(ValueError, match=rf"Identity needs \['{asked}'\], which sdpa does not do: set attention to"):
        attention_by_document(module, *states(1, 6), mask, scaling=0.3, **{asked: torch.ones(1)})


def mask_of(positions: list[list[int]], network: nn.Module | None = None, **arguments: Any) -> Tensor | None:
    """What transformers makes for rows at these positions."""
    config = (network or tiny_architecture("llama")).config
    rows = torch.tensor(positions)
    embedded = torch.zeros(*rows.shape, 32)
    mask = create_causal_mask(
        **{"attention_mask": None, "past_key_values": None, "position_ids": rows} | arguments,
        config=config,
        inputs_embeds=embedded,
    )
    assert mask is None or isinstance(mask, Tensor)
    return mask


def test_lengths_are_read_off_restarting_positions() -> None:
    lengths = mask_of([[0, 1, 2, 0, 0, 1], [0, 1, 2, 3, 4, 5], [0, 1, 0, 1, 2, 3]])
    assert lengths is not None
    assert lengths.tolist() == [3, 1, 2, 6, 2, 4]
    assert mask_of([[0], [0]]) is None


def test_one_document_a_row_needs_no_mask() -> None:
    assert mask_of([[0, 1, 2, 3], [0, 1, 2, 3]]) is None


def test_padding_and_other_masks_are_those_of_sdpa() -> None:
    left = torch.tensor([[0, 0, 1, 1], [1, 1, 1, 1]])
    positions = [[0, 1, 0, 1], [0, 1, 0, 1]]
    sdpa = tiny_architecture("llama", "sdpa")
    for arguments in (
        {"attention_mask": left},
        {"and_mask_function": lambda batch, head, query, key: query - key < 2},
        {"or_mask_function": lambda batch, head, query, key: key < 1},
    ):
        ours, expected = mask_of(positions, **arguments), mask_of(positions, sdpa, **arguments)
        assert ours is not None
        assert ours.ndim == 4
        assert torch.equal(ours, expected)


def test_windows_encoders_and_other_devices_get_a_mask() -> None:
    common: dict[str, Any] = {"batch_size": 1, "q_length": 6, "kv_length": 6, "allow_is_causal_skip": False}
    common |= {"use_vmap": False}
    lengths = document_lengths_or_mask(mask_function=causal_mask_function, device="cpu", **common)
    assert lengths is not None
    assert lengths.tolist() == [6]
    window = sliding_window_causal_mask_function(2)
    masks = [
        document_lengths_or_mask(mask_function=window, local_size=2, device="cpu", **common),
        document_lengths_or_mask(mask_function=lambda b, h, q, k: q - k < 2, device="cpu", **common),
        document_lengths_or_mask(mask_function=causal_mask_function, device="meta", **common),
        document_lengths_or_mask(mask_function=causal_mask_function, device="cpu", **common | {"kv_length": 9}),
    ]
    assert [mask.shape if mask is not None else None for mask in masks] == [(1, 1, 6, 6)] * 3 + [(1, 1, 6, 9)]
    assert masks[0] is not None
    assert masks[0][0, 0].sum(1).tolist() == [1, 2, 2, 2, 2, 2]


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma3_text"])
@pytest.mark.parametrize("use_cache", [False, True])
def test_generation_is_that_of_sdpa(name: str, use_cache: bool) -> None:
    network = (
        tiny_architecture(name, layer_types=["sliding_attention", "full_attention"], sliding_window=4)
        if (name == "gemma3_text")
        else tiny_architecture(name)
    )
    prompts = token_rows(97, rows=2, length=7)
    mask = torch.ones_like(prompts)
    mask[0, :3] = 0  # padded on the left
    sequences = {}
    for attention in (BY_DOCUMENT, "sdpa"):
        network.set_attn_implementation(attention)
        assert network.config._attn_implementation == attention
        sequences[attention] = network.generate(
            prompts, attention_mask=mask, max_new_tokens=9, do_sample=False, use_cache=use_cache, eos_token_id=-1
        )
        alone = network.generate(
            prompts[:1, 3:],
            max_new_tokens=9,
            do_sample=False,
            use_cache=use_cache,
            eos_token_id=-1,
            attention_mask=mask[:1, 3:],
        )
        assert torch.equal(sequences[attention][0, 7:], alone[0, 4:])
    assert torch.equal(sequences[BY_DOCUMENT], sequences["sdpa"])


def test_packed_rows_never_make_a_mask(monkeypatch: pytest.MonkeyPatch) -> None:
    network = tiny_architecture("llama")
    ids = token_rows(97, rows=2, length=6)
    positions = torch.tensor([[0, 1, 2, 0, 1, 2], [0, 1, 2, 3, 4, 5]])
    batch: Any = {"input_ids": ids, "position_ids": positions}
    with inference(network):
        expected = hidden_states(network, batch)
        monkeypatch.setattr(document_attention, "sdpa_mask", None)  # calling it would raise
        torch.testing.assert_close(hidden_states(network, batch), expected)


def test_only_architectures_that_it_serves_get_it() -> None:
    assert implementation_for(BY_DOCUMENT, LlamaForCausalLM) == BY_DOCUMENT
    assert implementation_for(BY_DOCUMENT, BertForMaskedLM) == BY_DOCUMENT
    for architecture in (Gemma2ForCausalLM, GptOssForCausalLM, FalconForCausalLM, None):
        assert implementation_for(BY_DOCUMENT, architecture) is None
        assert implementation_for("sdpa", architecture) == "sdpa"
        assert implementation_for("eager", architecture) == "eager"


@pytest.mark.parametrize(
    ("name", "chosen"),
    [("llama", BY_DOCUMENT), ("gemma2", "eager"), ("gpt_oss", "eager"), ("bloom", "eager"), ("falcon", "sdpa")],
)
def test_the_default_attention_is_the_architectures_own(name: str, chosen: str) -> None:
    """Sinks, soft caps and position biases are part of the network; nothing may drop them."""
    network = tiny_architecture(name)
    assert network.config._attn_implementation == chosen
    eager = tiny_architecture(name, "eager")
    eager.load_state_dict(network.state_dict())
    ids = token_rows(97, rows=2, length=9)
    with torch.no_grad():
        torch.testing.assert_close(network(ids).logits, eager(ids).logits, rtol=1e-4, atol=1e-4)


def test_a_saved_network_does_not_ask_for_it(tmp_path: Path) -> None:
    tiny_architecture("llama").save_pretrained(tmp_path)
    assert BY_DOCUMENT not in (tmp_path / "config.json").read_text()
    assert AutoModelForCausalLM.from_pretrained(tmp_path).config._attn_implementation == "sdpa"
