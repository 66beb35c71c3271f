from __future__ import annotations

import pytest
import torch
from staged_run import packed_rows
from tiny_networks import tiny_gpt2, tiny_llama
from torch import Tensor, nn

from lightllm.models import LoRA, Prefix
from lightllm.models.anatomy import OwnNetwork
from lightllm.parallel.layout import find_layout


def test_what_a_network_computes_before_and_behind_its_blocks() -> None:
    llama = find_layout(tiny_llama(tied=False))
    assert {part.name: part.before for part in llama.parts} == {
        "embed_tokens": True,
        "norm": False,
        "lm_head": False,
    }
    assert (llama.name, llama.width, llama.dtype, llama.returns_tuple) == ("layers", 32, torch.float32, False)
    gpt2 = find_layout(LoRA(rank=2).attach(tiny_gpt2()))
    assert {part.name: part.before for part in gpt2.parts} == {
        "wte": True,
        "wpe": True,
        "ln_f": False,
        "lm_head": False,
    }


def test_costs_by_multiplications_and_by_weights() -> None:
    network = tiny_llama(tied=False)
    layout = find_layout(network)
    block = 32 * 32 * 2 + 2 * 32 * 16 + 3 * 32 * 48  # queries and outputs, keys and values, the neurons
    assert layout.costs("flops") == ([block, block], 0, 320 * 32)
    assert layout.costs("parameters") == ([block + 64, block + 64], 320 * 32, 320 * 32 + 32)
    assert sum(layout.costs("parameters")[0]) + 2 * 320 * 32 + 32 == sum(one.numel() for one in network.parameters())


class Odd(nn.Module):
    """A module whose norm is used where `place` says, or that keeps a weight of its own."""

    def __init__(self, place: str) -> None:
        super().__init__()
        self.tokens = nn.Embedding(40, 8)
        self.layers = nn.ModuleList([nn.Linear(8, 8) for _ in range(2)])
        self.norm = nn.LayerNorm(8)
        self.out = nn.Linear(8, 40)
        self.place = place
        if place == "none":
            self.shift = nn.Parameter(torch.zeros(8))

    def forward(self, input_ids: Tensor, position_ids: Tensor) -> Tensor:
        hidden = self.tokens(input_ids)
        if self.place == "ends":
            hidden = self.norm(hidden)
        for layer in self.layers:
            hidden = layer(hidden)
            if self.place == "between":
                hidden = self.norm(hidden)
        return self.norm(hidden)


@pytest.mark.parametrize(
    ("place", "message"), [("ends", "'norm' between"), ("between", "'norm' between"), ("none", "keeps 'shift'")]
)
def test_what_no_stage_could_own_is_refused(place: str, message: str) -> None:
    with pytest.raises(ValueError, match=f"{message}.*another strategy"):
        find_layout(OwnNetwork(Odd(place), "out"))


def test_a_learned_prefix_is_refused() -> None:
    with pytest.raises(ValueError, match="take LoRA or Full"):
        find_layout(Prefix(num_tokens=2).attach(tiny_llama()))


def test_looking_leaves_no_trace() -> None:
    network = tiny_llama().train()
    before = packed_rows(1, seed=1)
    find_layout(network)
    assert network.training
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in network.modules())
    assert before.keys()
