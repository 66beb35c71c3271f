from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from data_run import ready, text_data
from pruning_run import AtTheFirstBatch, by_full_passes, dense, pruned
from tiny_objective import Batches
from tiny_run import tiny_trainer
from torch import Tensor
from typing_extensions import override

from lightllm.callbacks import SparseGPTPruning, WandaPruning
from lightllm.callbacks.calibrated_pruning import CalibratedPruning
from lightllm.compression.calibration import InputStatistics
from lightllm.compression.effective_weight import EffectiveLayer
from lightllm.compression.masking import Masking
from lightllm.compression.masks import Amount
from lightllm.models import Transformation

pytestmark = pytest.mark.filterwarnings("ignore::lightning.fabric.utilities.warnings.PossibleUserWarning")

LEAVES = pytest.mark.parametrize("leaf", [WandaPruning, SparseGPTPruning])


class Largest(InputStatistics):
    """The largest magnitude of each input."""

    def __init__(self) -> None:
        self.values = torch.zeros(())

    @override
    def add(self, inputs: Tensor) -> None:
        self.values = torch.maximum(self.values, inputs.abs().amax(0))


class QuietestInput(CalibratedPruning[Largest]):
    """Prunes the column of the input that is never large."""

    statistics = Largest

    @override
    def transformation(self) -> Transformation:
        return Masking(type(self).__name__, self.leave_out)

    @override
    def prune_layer(self, layer: EffectiveLayer, inputs: Largest, amount: Amount) -> None:
        keep = torch.ones(layer.base.weight.shape, dtype=torch.bool)
        keep[:, inputs.values.argmin()] = False
        layer.set_keep(keep)


def test_a_leaf_is_given_each_layers_inputs_behind_the_layers_that_were_pruned(tmp_path: Path) -> None:
    def without_quietest(weight: Tensor, inputs: Tensor) -> Tensor:
        changed = weight.clone()
        changed[:, inputs.abs().amax(0).argmin()] = 0
        return changed

    watch = AtTheFirstBatch()
    pruned(tmp_path, [QuietestInput(0.5, num_documents=4), watch])
    expected = by_full_passes(tmp_path, 4, without_quietest)
    assert set(expected) == set(watch.weights)
    for name, weight in expected.items():
        torch.testing.assert_close(watch.weights[name], weight)
        assert int((watch.weights[name] == 0).all(0).sum()) == 1


@LEAVES
def test_another_seed_calibrates_on_other_documents(leaf: Any, tmp_path: Path) -> None:
    data = ready(text_data(tmp_path))
    first, second = (data.calibration_batches(3, seed)[0]["document_ids"] for seed in (0, 1))
    assert first.shape != second.shape or not torch.equal(first, second)
    watches = [AtTheFirstBatch(), AtTheFirstBatch(), AtTheFirstBatch()]
    for watch, seed in zip(watches, (0, 0, 1), strict=True):
        pruned(tmp_path, [leaf(0.5, num_documents=3, seed=seed), watch])
    name = "model.layers.1.mlp.down_proj"
    assert torch.equal(watches[0].weights[name], watches[1].weights[name])
    assert not torch.equal(watches[0].weights[name], watches[2].weights[name])


@LEAVES
def test_data_that_cannot_be_drawn_from_is_refused_before_training(leaf: Any, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="gives no documents to calibrate on"):
        tiny_trainer(tmp_path, [leaf(0.5)]).fit(dense(), datamodule=Batches([]))
    with pytest.raises(ValueError, match="these are a stream"):
        tiny_trainer(tmp_path, [leaf(0.5)], max_steps=2).fit(
            dense(), datamodule=text_data(tmp_path, reading={"streaming": True})
        )
