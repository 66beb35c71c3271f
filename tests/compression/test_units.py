from __future__ import annotations

import pytest
import torch
from tiny_architectures import tiny_architecture
from tiny_networks import tiny_llama, token_rows
from torch import nn

from lightllm.compression.layers import prunable_layers
from lightllm.compression.low_rank_network import decomposable_layers, decompose
from lightllm.compression.rank_choice import RankChoice
from lightllm.compression.units import UnitKind, find_units
from lightllm.export.compare import outputs
from lightllm.models import LoRA
from lightllm.models.anatomy import unwrapped


def zero_unit(network: nn.Module, kind: UnitKind, index: int, writers: bool) -> None:
    """Zero one unit of the first block, either where it is written or where it is read."""
    base = unwrapped(network)
    units = find_units(network, prunable_layers(network), [kind])[0]
    weights = {name: base.get_parameter(f"{name}.weight") for name in units.layers}
    marked = units.spread(torch.arange(units.number) == index, weights)
    with torch.no_grad():
        for name in units.writers if writers else [units.reader]:
            weights[name].mul_(~marked[name])


@pytest.mark.parametrize("factored", [False, True])
@pytest.mark.parametrize("kind", ["neurons", "heads"])
def test_a_unit_that_is_not_written_need_not_be_read(kind: UnitKind, factored: bool) -> None:
    """Rows and columns belong to the same unit: zero values and no reading of them are the same network."""
    logits = []
    for writers in (True, False):
        torch.manual_seed(0)
        network = tiny_llama()
        if factored:
            decompose(network, decomposable_layers(network), RankChoice(budget=0.9))
        before = outputs(network, token_rows())
        zero_unit(network, kind, 1, writers)
        logits.append(outputs(network, token_rows()))
        assert (logits[-1] - before).abs().max() > 1e-3
    torch.testing.assert_close(*logits)


def test_units_are_named_as_in_the_plain_network() -> None:
    network = LoRA(rank=2).attach(tiny_llama())
    neurons, _, heads, _ = find_units(network, prunable_layers(network), ["neurons", "heads"])
    mlp, attention = "model.layers.0.mlp", "model.layers.0.self_attn"
    assert neurons == ("neurons", 48, (f"{mlp}.gate_proj", f"{mlp}.up_proj"), f"{mlp}.down_proj")
    assert heads == ("heads", 2, tuple(f"{attention}.{one}_proj" for one in "qkv"), f"{attention}.o_proj")
    assert find_units(network, prunable_layers(network), []) == []


def test_what_has_no_such_units_is_refused() -> None:
    other = tiny_architecture("opt", dtype="float32")
    with pytest.raises(ValueError, match=r"no down_proj is among the layers of this OPTForCausalLM"):
        find_units(other, prunable_layers(other), ["neurons"])
    network = tiny_llama()
    with pytest.raises(ValueError, match=r"down_proj reads what model.layers.0.mlp.up_proj writes too.*leave out both"):
        find_units(network, prunable_layers(network, ["up_proj"]), ["neurons"])
