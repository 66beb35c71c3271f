"""FLOPs from weights against torch's own counter, which watches the operations that really run."""

from __future__ import annotations

import pytest
import torch
from peft import LoraConfig, PromptTuningConfig, TaskType, get_peft_model
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from transformers import LlamaConfig, LlamaForCausalLM

from lightllm.flops import attention_width, known_peak, measured_peak, peak_flops, step_flops

BATCH, SEQ, VOCAB = 2, 16, 48


def llama(tied: bool = False) -> LlamaForCausalLM:
    # Eager attention multiplies every query with every key, so the number of pairs is known: seq * seq.
    config = LlamaConfig(
        hidden_size=32,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        intermediate_size=64,
        vocab_size=VOCAB,
        tie_word_embeddings=tied,
        attn_implementation="eager",
    )
    return LlamaForCausalLM(config)


def counted(network: nn.Module) -> int:
    with FlopCounterMode(display=False) as counter:
        logits = network(input_ids=torch.arange(BATCH * SEQ).view(BATCH, SEQ) % VOCAB, use_cache=False).logits
        logits.sum().backward()
    return counter.get_total_flops()


def predicted(network: nn.Module, head: torch.Tensor) -> float:
    flops = step_flops(network, head, attention_width(network.config))  # type: ignore[arg-type]
    return flops.total(BATCH * SEQ, BATCH * SEQ, BATCH * SEQ * SEQ)


@pytest.mark.parametrize("tied", [False, True])
def test_full_training_is_what_torch_counts(tied: bool) -> None:
    network = llama(tied)
    assert predicted(network, network.lm_head.weight) == counted(network)


def test_untied_full_training_is_six_times_the_weights() -> None:
    network = llama()
    matrices = sum(p.numel() for p in network.parameters() if p.ndim == 2)
    matrices -= 2 * network.lm_head.weight.numel()  # the embedding is looked up, and the head is apart
    flops = step_flops(network, network.lm_head.weight)
    assert flops.per_token == 6 * matrices
    assert flops.per_target == 6 * network.lm_head.weight.numel()
    assert flops.per_pair == 0


def test_frozen_lower_layers_have_no_backward() -> None:
    network = llama()
    network.requires_grad_(False)
    network.model.layers[2].requires_grad_(True)
    network.lm_head.requires_grad_(True)
    assert predicted(network, network.lm_head.weight) == counted(network)


def test_everything_frozen_is_the_forward_pass() -> None:
    network = llama().requires_grad_(False)
    body = sum(p.numel() for p in network.model.layers.parameters() if p.ndim == 2)
    flops = step_flops(network, network.lm_head.weight, attention_width(network.config))
    assert flops.per_token == 2 * body
    assert flops.per_target == 2 * VOCAB * 32
    assert flops.per_pair == 4 * 32 * 3


def test_lora_is_about_four_times_the_weights() -> None:
    network = get_peft_model(llama(), LoraConfig(r=2, target_modules="all-linear", task_type=TaskType.CAUSAL_LM))
    head = network.get_base_model().lm_head.weight
    actual = counted(network)
    assert predicted(network, head) == pytest.approx(actual, rel=0.04)
    assert predicted(network, head) >= actual


def test_a_learned_prompt_needs_every_layers_gradient() -> None:
    network = get_peft_model(llama(), PromptTuningConfig(num_virtual_tokens=2, task_type=TaskType.CAUSAL_LM))
    body = sum(p.numel() for p in network.get_base_model().model.layers.parameters() if p.ndim == 2)
    assert step_flops(network, network.get_base_model().lm_head.weight).per_token == 4 * body


@pytest.mark.parametrize(
    ("name", "peak"),
    [
        ("NVIDIA H100 80GB HBM3", 989.4e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA A100-SXM4-80GB", 312e12),
        ("NVIDIA L4", 121e12),
        ("NVIDIA L40S", 362e12),
        ("NVIDIA A10G", 70e12),
        ("NVIDIA GeForce RTX 4090", 165.2e12),
        ("NVIDIA GeForce GTX 1080", None),
    ],
)
def test_known_peaks(name: str, peak: float | None) -> None:
    assert known_peak(name, torch.bfloat16) == peak
    assert known_peak(name, torch.float32) is None


def test_the_measured_peak_is_plausible_and_draws_no_random_numbers() -> None:
    before = torch.random.get_rng_state()
    peak = measured_peak(torch.device("cpu"), torch.float32, seconds=0.02)
    assert 1e8 < peak < 1e15
    assert torch.equal(before, torch.random.get_rng_state())


def test_a_cpu_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lightllm.flops.measured_peak", lambda device, dtype: 123.0)
    assert peak_flops(torch.device("cpu"), torch.bfloat16) == 123.0
