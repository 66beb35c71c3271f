"""Bytes alive against torch's own account of allocations, and products against its own counter."""

from __future__ import annotations

import pytest
import torch
from measured_memory import peak_allocated
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.functional import scaled_dot_product_attention
from torch.utils.flop_counter import FlopCounterMode

from lightllm.parallel.operation_meter import OperationMeter


def step(layers: nn.Module) -> None:
    layers(torch.ones(64, 128)).square().mean().backward()


def layers() -> nn.Module:
    return nn.Sequential(nn.Linear(128, 512), nn.GELU(), nn.Linear(512, 128))


def test_the_peak_is_what_torch_allocates_and_fake_tensors_have_the_same() -> None:
    real = layers()
    meter = OperationMeter()
    with meter:
        step(real)
    assert meter.peak == pytest.approx(
        peak_allocated(lambda: step(layers())) - sum(map(size, real.parameters())), rel=0.01
    )
    with FakeTensorMode():
        fake, fake_meter = layers(), OperationMeter()
        with fake_meter:
            step(fake)
    assert fake_meter.peak == meter.peak
    assert fake_meter.operations == meter.operations


def size(tensor: torch.Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def test_what_is_freed_is_no_longer_alive() -> None:
    with OperationMeter() as meter:
        one = torch.ones(100)
        view = one[:50]
        del one
        assert meter.live == 400
        del view
    assert (meter.live, meter.peak) == (0, 400)


def test_products_are_those_that_torch_counts() -> None:
    with FlopCounterMode(display=False) as counter, OperationMeter() as meter:
        step(layers())
    assert sum(one.flops for one in meter.operations) == counter.get_total_flops()


def test_causal_attention_is_half_of_all_pairs_forward_and_five_products_backward() -> None:
    query = torch.randn(1, 2, 8, 4, requires_grad=True)
    with OperationMeter() as meter:
        scaled_dot_product_attention(query, query, query, is_causal=True).sum().backward()
    products = [one.flops for one in meter.operations if one.flops]
    pairs = 2 * 8 * 8 / 2
    assert products == [4 * pairs * 4, 10 * pairs * 4]


def test_views_and_allocations_move_nothing_and_an_expanded_tensor_lies_there_once() -> None:
    one = torch.ones(10, 1)
    with OperationMeter() as meter:
        torch.empty(1000)
        assert one.view(1, 10).T.is_contiguous()
    assert meter.operations == []
    with OperationMeter() as meter:
        one.expand(10, 5) + 1
    assert [operation.moved for operation in meter.operations] == [40 + 200]
