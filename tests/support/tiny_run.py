"""A training run of a second: a network of two layers, random rows, and a module with the names that callbacks read."""

from __future__ import annotations

from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import Logger
from tiny_networks import tiny_llama
from torch import Tensor, nn
from torch.optim import Optimizer
from torchdata.stateful_dataloader import StatefulDataLoader

from lightllm.batch import IGNORE_INDEX, PADDING_DOCUMENT, TextBatch

VOCABULARY = 40


def tiny_batches(count: int, rows: int = 2, length: int = 8, padding: int = 2) -> list[TextBatch]:
    """Batches of one document a row, whose last positions are padding; documents are numbered through."""
    generator = torch.Generator().manual_seed(1)
    batches = []
    for index in range(count):
        tokens = torch.randint(VOCABULARY, (rows, length + 1), generator=generator)
        documents = (torch.arange(rows) + index * rows)[:, None].repeat(1, length)
        labels = tokens[:, 1:].clone()
        if padding:
            labels[:, -padding:] = IGNORE_INDEX
            documents[:, -padding:] = PADDING_DOCUMENT
        positions = torch.arange(length).repeat(rows, 1)
        batches.append(
            TextBatch(input_ids=tokens[:, :-1], labels=labels, position_ids=positions, document_ids=documents)
        )
    return batches


class TinyModule(LightningModule):
    """The mean loss per target token, logged by the names of `LanguageModule`."""

    def __init__(self, network: nn.Module | None = None, learning_rate: float = 1e-2) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.network = network or tiny_llama(VOCABULARY, tied=False)
        self.learning_rate = learning_rate

    @property
    def built_network(self) -> nn.Module:
        return self.network

    def training_step(self, batch: TextBatch, batch_idx: int) -> dict[str, Tensor]:
        loss_sum, weight = self._loss(batch)
        self.log("train/loss", loss_sum.detach() / weight, prog_bar=True)
        return {"loss": loss_sum / weight, "loss_sum": loss_sum.detach(), "weight": weight}

    def validation_step(self, batch: TextBatch, batch_idx: int) -> None:
        loss_sum, weight = self._loss(batch)
        self.log("val/loss", loss_sum / weight, batch_size=1, prog_bar=True)

    def configure_optimizers(self) -> Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=self.learning_rate)

    def _loss(self, batch: TextBatch) -> tuple[Tensor, Tensor]:
        logits = self.network(input_ids=batch["input_ids"], position_ids=batch["position_ids"], use_cache=False).logits
        loss = nn.functional.cross_entropy(logits.flatten(0, 1), batch["labels"].flatten(), reduction="sum")
        return loss, (batch["labels"] != IGNORE_INDEX).sum()


def tiny_loader(batches: list[TextBatch]) -> StatefulDataLoader[Any]:
    """Give the batches out as they are."""
    return StatefulDataLoader(batches, batch_size=None)  # type: ignore[arg-type]


def tiny_trainer(folder: Any, callbacks: list[Callback], logger: list[Logger] | None = None, **fields: Any) -> Trainer:
    """A quiet trainer on the CPU in `folder`, without checkpoints, that logs every step."""
    defaults: dict[str, Any] = {
        "accelerator": "cpu",
        "devices": 1,
        "max_epochs": 1,
        "log_every_n_steps": 1,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "enable_checkpointing": False,
        "num_sanity_val_steps": 0,
    }
    return Trainer(default_root_dir=folder, callbacks=callbacks, logger=logger or False, **(defaults | fields))
