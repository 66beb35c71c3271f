from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tiny_networks import tiny_llama
from tiny_run import TinyModule, tiny_batches, tiny_loader, tiny_trainer
from torch import nn

from lightllm.callbacks import NetworkSize
from lightllm.callbacks.network_size import describe, num_weights, shortened
from lightllm.models import LoRA


def test_a_run_says_how_large_its_network_is(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    network, batches = tiny_llama(40, tied=False).train(), tiny_loader(tiny_batches(1))
    with caplog.at_level("INFO"):
        tiny_trainer(tmp_path, [NetworkSize()], max_steps=1).fit(TinyModule(network), batches, batches)
    total = sum(parameter.numel() for parameter in network.parameters())
    assert f"network: {total / 1000:.1f}k parameters, all of them train, float32" in caplog.text


def test_what_trains_is_told_apart() -> None:
    network = LoRA(rank=4).attach(tiny_llama().to(torch.bfloat16))
    trained = sum(one.numel() for one in network.parameters() if one.requires_grad)
    total = sum(one.numel() for one in network.parameters())
    told = describe(network)
    assert told == f"{total / 1000:.1f}k parameters, {trained / 1000:.1f}k of them train, float32 on frozen bfloat16"


def test_a_network_of_which_nothing_trains() -> None:
    network = tiny_llama().requires_grad_(False)
    total = sum(one.numel() for one in network.parameters())
    assert describe(network) == f"{total / 1000:.1f}k parameters, none of them trains, float32"


def test_a_tied_head_counts_once() -> None:
    tied, untied = tiny_llama(tied=True), tiny_llama(tied=False)
    assert describe(tied).startswith(f"{sum(one.numel() for one in tied.parameters()) / 1000:.1f}k")
    assert describe(tied) != describe(untied)


def test_packed_weights_count_as_what_they_stand_for() -> None:
    bitsandbytes = pytest.importorskip("bitsandbytes")
    layer = bitsandbytes.nn.Linear4bit(64, 96, bias=False, quant_type="nf4")
    layer.weight = bitsandbytes.nn.Params4bit(torch.randn(96, 64), requires_grad=False).to("cpu")
    assert layer.weight.numel() == 96 * 64 / 2
    assert num_weights(layer.weight) == 96 * 64
    assert (
        describe(nn.Sequential(layer, nn.Linear(96, 2)))
        == "6.3k parameters, 194 of them train, float32 on frozen 4-bit"
    )


@pytest.mark.parametrize(
    ("number", "short"), [(7, "7"), (1_000, "1.0k"), (139_400_000, "139.4M"), (7_060_000_000, "7.1B")]
)
def test_numbers_are_short(number: int, short: str) -> None:
    assert shortened(number) == short
