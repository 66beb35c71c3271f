from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from pruning_run import ADAPTERS, AtTheFirstBatch, by_full_passes, dense, pruned
from torch import Tensor

from lightllm.callbacks import WandaPruning
from lightllm.compression.layers import prunable_layers
from lightllm.compression.masks import sparsity_of

pytestmark = pytest.mark.filterwarnings("ignore::lightning.fabric.utilities.warnings.PossibleUserWarning")


def wanda(weight: Tensor, inputs: Tensor, group: int) -> Tensor:
    """Half of each group of a row goes, by the paper's score."""
    scores = weight.abs() * inputs.norm(dim=0)
    ranks = scores.unflatten(1, (-1, group or weight.shape[1])).argsort(2).argsort(2)
    return weight * (ranks >= ranks.shape[2] / 2).flatten(1)


@pytest.mark.parametrize("adapter", ADAPTERS)
@pytest.mark.parametrize("fields", [{"sparsity": 0.5}, {"pattern": "2:4"}])
def test_is_wanda_in_full_passes(tmp_path: Path, adapter: str, fields: dict[str, Any]) -> None:
    watch = AtTheFirstBatch()
    pruned(tmp_path, [WandaPruning(num_documents=6, **fields), watch], ADAPTERS[adapter])
    group = 4 if "pattern" in fields else 0
    expected = by_full_passes(tmp_path, 6, lambda weight, inputs: wanda(weight, inputs, group))
    for name, weight in expected.items():
        same = (watch.weights[name] != 0) == (weight != 0)
        assert same.float().mean() > 0.998, f"{name}: sums in another order may swap a weight"
        assert torch.equal(watch.weights[name][same], weight[same])


def test_nothing_but_masks_changes(tmp_path: Path) -> None:
    """No random number is drawn, and no batch is taken from the run."""
    watch = AtTheFirstBatch()

    class Batch(AtTheFirstBatch):
        def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, *_: Any) -> None:
            self.seen = (batch["input_ids"].clone(), torch.get_rng_state(), pl_module.training)

    watches = [Batch(), Batch()]
    pruned(tmp_path, [WandaPruning(0.5, num_documents=6), watch, watches[0]])
    pruned(tmp_path, [watches[1]])
    assert torch.equal(watches[0].seen[0], watches[1].seen[0])
    assert torch.equal(watches[0].seen[1], watches[1].seen[1])
    assert watches[0].seen[2]
    for name, layer in prunable_layers(dense().built_network).items():
        kept = watch.weights[name] != 0
        assert torch.equal(watch.weights[name][kept], layer.get_parameter("weight")[kept])


@pytest.mark.parametrize("adapter", ADAPTERS)
def test_what_is_pruned_stays_pruned(tmp_path: Path, adapter: str) -> None:
    watch = AtTheFirstBatch()
    pruning = WandaPruning(0.6, num_documents=4, schedule="cubic", begin=0, end=4, every_n_steps=1)
    pruned(tmp_path, [pruning, watch], ADAPTERS[adapter], steps=5)
    for before, after in zip(watch.keeps, watch.keeps[1:], strict=False):
        assert all(not (after[name] & ~before[name]).any() for name in after)
    assert all(sparsity_of(keep) == pytest.approx(0.6, abs=0.02) for keep in watch.keeps[-1].values())


def test_layers_outside_are_dense(tmp_path: Path) -> None:
    watch = AtTheFirstBatch()
    pruned(tmp_path, [WandaPruning(0.5, num_documents=3, leave_out=[r"layers\.1"]), watch])
    assert len(watch.weights) == 7
    assert all("layers.0" in name for name in watch.weights)
