"""A run small enough to be stopped and resumed at every step, that notes what it is given and when."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.utilities.warnings import PossibleUserWarning
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers.logger import DummyLogger
from torch import Tensor, nn
from torch.utils.data import DataLoader, Sampler
from torchdata.stateful_dataloader import StatefulDataLoader
from typing_extensions import override

from lightllm.callbacks import Checkpoint, RandomState

ROWS, BATCH = 14, 2


class EpochOrder(Sampler[int]):
    """All rows in an order that depends on the epoch alone."""

    def __init__(self) -> None:
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return ROWS

    def __iter__(self) -> Iterator[int]:
        return iter(torch.randperm(ROWS, generator=torch.Generator().manual_seed(self.epoch)).tolist())


class NotingLogger(DummyLogger):
    """Notes which values were logged for which step."""

    def __init__(self) -> None:
        super().__init__()
        self.steps: dict[int, set[str]] = {}

    @override
    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:  # type: ignore[override]
        assert step is not None
        self.steps.setdefault(step, set()).update(metrics)


class NotingModule(LightningModule):
    """A linear layer with dropout that notes (epoch, batch index, rows) of every batch, and its hooks."""

    def __init__(self, read_estimate: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer = nn.Linear(4, 1)
        self.dropout = nn.Dropout(0.3)
        self.read_estimate = read_estimate
        self.seen: list[tuple[int, int, tuple[int, ...]]] = []
        self.events: list[str] = []
        self.rows = NotingLogger()

    @override
    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        self.seen.append((self.current_epoch, batch_idx, tuple(batch[:, 0].tolist())))
        loss = self.dropout(self.layer(batch.float() / ROWS)).square().mean()
        self.log("train/loss", loss)
        return loss

    @override
    def validation_step(self, batch: Tensor, batch_idx: int) -> None:
        self.log("val/loss", self.layer(batch.float() / ROWS).square().mean())

    @override
    def on_validation_epoch_end(self) -> None:
        if not self.trainer.sanity_checking:
            self.events.append(f"validated {self.global_step}")

    @override
    def on_train_epoch_start(self) -> None:
        self.events.append(f"began {self.current_epoch}")

    @override
    def on_train_epoch_end(self) -> None:
        self.events.append(f"ended {self.current_epoch}")

    @override
    def configure_optimizers(self) -> Any:
        if self.read_estimate:
            assert self.trainer.estimated_stepping_batches > 0
        optimizer = torch.optim.AdamW(self.parameters(), lr=1e-2)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def state(self) -> list[Tensor]:
        """The weights and everything the optimizer knows of them."""
        (optimizer,) = self.trainer.optimizers
        tensors = [value for state in optimizer.state.values() for value in state.values()]
        return [*(parameter.detach().clone() for parameter in self.parameters()), *tensors]


class SaveAt(Callback):
    """Saves through the trainer in one hook, each time, to `folder/step=….ckpt`; comes after other callbacks."""

    def __init__(self, folder: Path, hook: str) -> None:
        def save(trainer: Trainer, *_: Any) -> None:
            if not trainer.sanity_checking and trainer.global_step and not trainer.fit_loop._should_accumulate():
                trainer.save_checkpoint(folder / f"step={trainer.global_step}.ckpt")

        setattr(self, hook, save)


def rows() -> Tensor:
    """Rows that say their own number."""
    return torch.arange(ROWS)[:, None].repeat(1, 4)


def train_loader(workers: int = 0) -> StatefulDataLoader[Any]:
    return StatefulDataLoader(rows(), BATCH, sampler=EpochOrder(), num_workers=workers)  # type: ignore[arg-type]


def run(
    folder: Path,
    callbacks: list[Callback] | None = None,
    *,
    resume: Path | str | None = None,
    validate: bool = False,
    module: NotingModule | None = None,
    loader: Any = None,
    **fields: Any,
) -> NotingModule:
    """Train; 7 batches an epoch. Exact resumption is on unless `callbacks` says otherwise."""
    module = module or NotingModule()
    module.rows = NotingLogger()
    defaults: dict[str, Any] = {"max_epochs": 3, "log_every_n_steps": 1, "logger": module.rows}
    trainer = Trainer(
        default_root_dir=folder,
        accelerator="cpu",
        callbacks=[RandomState(), Checkpoint()] if callbacks is None else callbacks,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        **(defaults | fields),
    )
    loader = loader or train_loader()
    validation = DataLoader(rows()[:4], 2) if validate else None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", PossibleUserWarning)
        warnings.filterwarnings("ignore", "Checkpoint directory|Be aware that when using")
        trainer.fit(module, loader, validation, ckpt_path=resume, weights_only=True)
    return module


def same_state(one: NotingModule, other: NotingModule) -> bool:
    """Whether two runs ended bitwise the same."""
    return all(map(torch.equal, one.state(), other.state()))
