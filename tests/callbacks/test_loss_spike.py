from __future__ import annotations

import math
import random
import statistics
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningDataModule, LightningModule
from tiny_run import tiny_batches, tiny_loader, tiny_trainer
from torch import Tensor, nn

from lightllm.batch import TextBatch
from lightllm.callbacks import LossSpike
from lightllm.loggers import RunCSVLogger

pytestmark = pytest.mark.filterwarnings("ignore::lightning.fabric.utilities.warnings.PossibleUserWarning")


class Scripted(LightningModule):
    """A module whose loss per token is what the first document's number looks up."""

    def __init__(self, losses: dict[int, float]) -> None:
        super().__init__()
        self.losses = losses
        self.layer = nn.Linear(1, 1)

    def training_step(self, batch: TextBatch, batch_idx: int) -> dict[str, Tensor]:
        loss = self.losses[int(batch["document_ids"][0, 0])]
        weight = (batch["labels"] != -100).sum()
        return {"loss": self.layer.weight.sum(), "loss_sum": loss * weight, "weight": weight}

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.1)


class Described(LightningDataModule):
    def __init__(self, batches: list[TextBatch]) -> None:
        super().__init__()
        self.batches = batches

    def describe_document(self, split: str, document_id: int) -> str:
        return f"{split}.jsonl:{document_id + 1}"

    def train_dataloader(self) -> Any:
        return tiny_loader(self.batches)


def noisy(count: int) -> dict[int, float]:
    """Losses of batches of two documents: 2 with a deviation of 0.1."""
    draw = random.Random(3)
    return {2 * step: 2 + 0.1 * draw.gauss(0, 1) for step in range(count)}


def test_a_spike_is_named_logged_and_nothing_else_is(tmp_path: Path) -> None:
    losses = noisy(60) | {2 * 40: 5.0}
    trainer = tiny_trainer(tmp_path, [LossSpike(memory=20)], [RunCSVLogger(tmp_path)])
    with pytest.warns(UserWarning, match="running mean") as caught:
        trainer.fit(Scripted(losses), datamodule=Described(tiny_batches(60)))
    (message,) = [str(one.message) for one in caught if "running mean" in str(one.message)]
    assert message.startswith("step 41: loss 5.000 is ")
    assert message.endswith("the worst batch (loss 5.000) holds train.jsonl:81, train.jsonl:82")
    header, row = (tmp_path / "metrics.csv").read_text().splitlines()
    assert header == "step,train/loss_spike"
    assert row.startswith("40,")
    excess = float(row.split(",")[1])
    # The exponential mean and deviation are near those of all the losses before.
    before = [losses[2 * step] for step in range(40)]
    assert excess == pytest.approx((5 - statistics.mean(before)) / statistics.stdev(before), rel=0.3)


def test_the_worst_batch_of_an_accumulated_step_is_named(tmp_path: Path) -> None:
    losses = noisy(60) | {2 * 43: 9.0}
    trainer = tiny_trainer(tmp_path, [LossSpike(memory=20, max_documents=1)], accumulate_grad_batches=2)
    with pytest.warns(UserWarning, match=r"step 22: loss .* \(loss 9.000\) holds train.jsonl:87 and 1 more"):
        trainer.fit(Scripted(losses), datamodule=Described(tiny_batches(60)))


def test_without_a_datamodule_documents_are_numbered(tmp_path: Path) -> None:
    trainer = tiny_trainer(tmp_path, [LossSpike(memory=20)])
    with pytest.warns(UserWarning, match="holds 80, 81"):
        trainer.fit(Scripted(noisy(50) | {80: 5.0}), tiny_loader(tiny_batches(50)))


def test_mean_and_variance_are_the_exponential_ones() -> None:
    spike = LossSpike(memory=10)
    losses = list(noisy(200).values())
    for loss in losses:
        spike.observe(loss)
    # The definition: each loss weighs 9/10 of the next one, after ten that weigh the same.
    weights = [1 / 10] * 10
    for _ in losses[10:]:
        weights = [weight * 0.9 for weight in weights] + [0.1]
    mean = sum(w * x for w, x in zip(weights, losses, strict=True))
    assert spike.state_dict()["mean"] == pytest.approx(mean)
    variance = sum(w * (x - mean) ** 2 for w, x in zip(weights, losses, strict=True))
    assert spike.state_dict()["variance"] == pytest.approx(variance)


def test_a_spike_does_not_move_the_mean_but_a_new_level_does() -> None:
    spike = LossSpike(memory=20)
    for loss in noisy(40).values():
        assert spike.observe(loss) < 6
    mean = spike.state_dict()["mean"]
    assert spike.observe(6.0) > 6
    assert spike.state_dict()["mean"] == mean
    assert [spike.observe(6.0) > 6 for _ in range(10)][-1] is False
    assert spike.state_dict()["mean"] > mean


def test_no_reports_at_first_nor_for_what_is_no_number_nor_for_hairs() -> None:
    spike = LossSpike(memory=20)
    assert [spike.observe(loss) for loss in (10.0, 2.0, 50.0)] == [0, 0, 0]
    assert spike.observe(math.nan) == spike.observe(math.inf) == 0
    assert spike.state_dict()["steps"] == 3
    still = LossSpike(memory=20)
    for _ in range(30):
        still.observe(2.0)
    assert still.observe(2.0001) < 1


def test_a_resumed_callback_goes_on() -> None:
    whole, first, second = (LossSpike(memory=10) for _ in range(3))
    losses = list(noisy(30).values())
    expected = [whole.observe(loss) for loss in losses]
    seen = [first.observe(loss) for loss in losses[:15]]
    second.load_state_dict(first.state_dict())
    assert seen + [second.observe(loss) for loss in losses[15:]] == expected


def test_a_quiet_run_is_quiet(tmp_path: Path) -> None:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer = tiny_trainer(tmp_path, [LossSpike(memory=20)], [RunCSVLogger(tmp_path)])
        trainer.fit(Scripted(noisy(60)), tiny_loader(tiny_batches(60)))
    assert not [one for one in caught if "running mean" in str(one.message)]
    assert not (tmp_path / "metrics.csv").exists()


def test_senseless_settings_are_refused() -> None:
    with pytest.raises(ValueError, match="memory at least 2"):
        LossSpike(memory=1)
