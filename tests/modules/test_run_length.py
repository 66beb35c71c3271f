from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningDataModule, LightningModule
from resumable_run import SaveAt
from tiny_run import tiny_trainer
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset
from torchdata.stateful_dataloader import StatefulDataLoader
from typing_extensions import override

from lightllm.modules.run_length import total_optimizer_steps

ROWS = torch.arange(10.0)[:, None]

pytestmark = pytest.mark.filterwarnings("ignore::lightning.fabric.utilities.warnings.PossibleUserWarning")


class Watched(StatefulDataLoader[Any]):
    """Counts how often it is read from the beginning."""

    begun = 0

    @override
    def __iter__(self) -> Iterator[Any]:
        self.begun += 1
        return super().__iter__()


class Asks(LightningModule):
    """Asks for the run's length where the schedule does."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(1, 1)
        self.total: int | None = None
        self.begun = 0
        self.seen: list[float] = []

    @override
    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        self.seen += batch[:, 0].tolist()
        return self.layer(batch).sum()  # type: ignore[no-any-return]

    @override
    def configure_optimizers(self) -> torch.optim.Optimizer:
        loader = self.trainer.fit_loop._data_source.instance
        before = loader.begun if isinstance(loader, Watched) else 0
        self.total = total_optimizer_steps(self.trainer)
        self.begun = (loader.begun if isinstance(loader, Watched) else 0) - before
        return torch.optim.SGD(self.parameters(), lr=0.1)


def run(folder: Path, data: Any, module: Asks | None = None, resume: Path | None = None, **fields: Any) -> Asks:
    module = module or Asks()
    trainer = tiny_trainer(folder, [], **fields)
    trainer.fit(module, data, ckpt_path=resume, weights_only=True)
    assert module.total == trainer.global_step
    return module


@pytest.mark.parametrize(
    ("fields", "steps"),
    [
        ({"max_epochs": 1}, 5),
        ({"max_epochs": 3}, 15),
        ({"max_epochs": 2, "accumulate_grad_batches": 2}, 6),  # the last window of an epoch is short
        ({"max_epochs": 2, "accumulate_grad_batches": 8}, 2),
        ({"max_epochs": 2, "limit_train_batches": 3}, 6),
        ({"max_epochs": 2, "limit_train_batches": 0.5}, 4),
        ({"max_epochs": 2, "limit_train_batches": 3, "accumulate_grad_batches": 2}, 4),
        ({"max_epochs": 2, "limit_train_batches": 30}, 10),
        ({"max_steps": 7, "max_epochs": -1}, 7),
        ({"max_steps": 7, "max_epochs": 1}, 5),
        ({"max_steps": 3, "max_epochs": 5}, 3),
        ({"max_steps": 3, "max_epochs": 5, "accumulate_grad_batches": 2}, 3),
        ({"overfit_batches": 2, "max_epochs": 2}, 4),
    ],
)
def test_total_is_what_the_run_takes(tmp_path: Path, fields: dict[str, Any], steps: int) -> None:
    module = run(tmp_path, Watched(ROWS, 2), **fields)  # type: ignore[arg-type]
    assert module.total == steps
    assert module.begun == 0


class Stream(IterableDataset[Tensor]):
    """Rows whose number nobody knows."""

    @override
    def __iter__(self) -> Iterator[Tensor]:
        return iter(ROWS)


@pytest.mark.parametrize(
    ("fields", "total"),
    [
        ({"max_epochs": 2}, None),
        ({"max_epochs": 2, "max_steps": 4}, 4),
        ({"max_epochs": 2, "limit_train_batches": 3, "accumulate_grad_batches": 2}, 4),
    ],
)
def test_a_stream_ends_where_it_is_told_to(tmp_path: Path, fields: dict[str, Any], total: int | None) -> None:
    module = Asks()
    tiny_trainer(tmp_path, [], **fields).fit(module, DataLoader(Stream(), 2))
    assert module.total == total


def test_a_run_by_time_has_no_known_end(tmp_path: Path) -> None:
    module = Asks()
    trainer = tiny_trainer(tmp_path, [], max_epochs=-1, max_time={"seconds": 0})
    trainer.fit(module, DataLoader(ROWS, 2))  # type: ignore[arg-type]
    assert module.total is None


class Data(LightningDataModule):
    """Knows its length, and makes a loader only when it is read."""

    def __init__(self, num_train_batches: int | None) -> None:
        super().__init__()
        self.num_train_batches = num_train_batches
        self.made = 0

    @override
    def train_dataloader(self) -> Any:
        self.made += 1
        return DataLoader(ROWS, 2)  # type: ignore[arg-type]


def test_a_datamodule_that_knows_its_length_is_believed(tmp_path: Path) -> None:
    data = Data(num_train_batches=5)
    assert run(tmp_path, data).total == 5
    assert data.made == 1
    assert run(tmp_path, Data(None), max_epochs=2).total == 10


def test_a_resumed_run_goes_on_where_it_was(tmp_path: Path) -> None:
    """Lightning's own estimate would lose the loader's place."""
    whole = Asks()
    saving = tiny_trainer(tmp_path, [SaveAt(tmp_path, "on_train_batch_end")], max_steps=5)
    saving.fit(whole, Watched(ROWS, 2))  # type: ignore[arg-type]
    rest = run(tmp_path, Watched(ROWS, 2), resume=tmp_path / "step=2.ckpt", max_steps=5)  # type: ignore[arg-type]
    assert rest.seen == whole.seen[4:]
    assert rest.total == 5
