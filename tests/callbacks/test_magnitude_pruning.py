from __future__ import annotations

from pathlib import Path

import pytest
import torch
from pruning_run import ADAPTERS, AtTheFirstBatch, dense, pruned

from lightllm.callbacks import MagnitudePruning
from lightllm.compression.layers import prunable_layers
from lightllm.compression.masks import Pattern, follows

pytestmark = pytest.mark.filterwarnings("ignore::lightning.fabric.utilities.warnings.PossibleUserWarning")


@pytest.mark.parametrize("adapter", ADAPTERS)
def test_the_smallest_weights_of_each_layer_go(tmp_path: Path, adapter: str) -> None:
    watch = AtTheFirstBatch()
    pruned(tmp_path, [MagnitudePruning(0.4), watch], ADAPTERS[adapter])
    for name, layer in prunable_layers(dense().built_network).items():
        weight = layer.get_parameter("weight").detach()
        threshold = weight.abs().flatten().sort().values[round(0.4 * weight.numel()) - 1]
        assert torch.equal(watch.weights[name], torch.where(weight.abs() > threshold, weight, 0.0))


def test_the_smallest_weights_of_the_network_go(tmp_path: Path) -> None:
    watch = AtTheFirstBatch()
    pruned(tmp_path, [MagnitudePruning(0.4, budget="network"), watch])
    weights = {
        name: one.get_parameter("weight").detach() for name, one in prunable_layers(dense().built_network).items()
    }
    everything = torch.cat([weight.abs().flatten() for weight in weights.values()])
    threshold = everything.sort().values[round(0.4 * len(everything)) - 1]
    for name, weight in weights.items():
        assert torch.equal(watch.weights[name], torch.where(weight.abs() > threshold, weight, 0.0))


def test_a_pattern_keeps_the_largest_of_each_group(tmp_path: Path) -> None:
    watch = AtTheFirstBatch()
    pruned(tmp_path, [MagnitudePruning(pattern="2:4"), watch])
    for name, layer in prunable_layers(dense().built_network).items():
        groups = layer.get_parameter("weight").detach().unflatten(1, (-1, 4))
        kept = groups.abs().argsort(2).argsort(2) >= 2
        assert torch.equal(watch.weights[name], (groups * kept).flatten(1))
        assert follows(watch.weights[name], Pattern(2, 4))


@pytest.mark.parametrize("budget", ["layer", "network"])
@pytest.mark.parametrize("adapter", ADAPTERS)
def test_what_is_pruned_stays_pruned(tmp_path: Path, adapter: str, budget: str) -> None:
    """Under LoRA the merged weight behind the mask goes on changing, and may become large again."""
    watch = AtTheFirstBatch()
    pruning = MagnitudePruning(0.8, budget=budget, schedule="cubic", begin=0, end=8, every_n_steps=1)  # type: ignore[arg-type]
    pruned(tmp_path, [pruning, watch], ADAPTERS[adapter], steps=8)
    for before, after in zip(watch.keeps, watch.keeps[1:], strict=False):
        assert all(not (after[name] & ~before[name]).any() for name in after)
    last = torch.cat([keep.flatten() for keep in watch.keeps[-1].values()])
    assert 1 - float(last.float().mean()) == pytest.approx(0.8, abs=1e-3)


def test_a_pattern_has_no_budget_of_the_network() -> None:
    with pytest.raises(ValueError, match="set budget to layer"):
        MagnitudePruning(pattern="2:4", budget="network")
