"""What optimizers hold."""

from __future__ import annotations

import pytest
import torch

from lightllm.modules.base import adamw
from lightllm.parallel.optimizer_cost import optimizer_cost


def test_fused_adamw_holds_two_numbers_a_weight_and_nothing_for_a_moment() -> None:
    found = optimizer_cost(adamw, torch.float32)
    assert found.state == 8
    assert found.scratch < 0.1
    assert optimizer_cost(adamw, torch.bfloat16).state == 4


def test_momentum_holds_one() -> None:
    found = optimizer_cost(lambda parameters: torch.optim.SGD(parameters, lr=0.1, momentum=0.9), torch.float32)
    assert found.state == 4


def test_plain_adamw_takes_more_of_one_tensor_or_of_all_for_a_moment() -> None:
    one = optimizer_cost(torch.optim.AdamW, torch.float32)
    assert one.scratch >= 4
    assert one.scratch_of_all == 0
    assert optimizer_cost(torch.optim.AdamW, torch.float32, "cuda").scratch_of_all == 4


def test_eight_bits_are_counted_as_such() -> None:
    bitsandbytes = pytest.importorskip("bitsandbytes")
    found = optimizer_cost(bitsandbytes.optim.AdamW8bit, torch.float32)
    assert 2 <= found.state < 3
