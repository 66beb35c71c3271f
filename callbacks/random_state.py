"""Random numbers go on where they were when a run is resumed."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_warn
from lightning.pytorch.utilities.types import STEP_OUTPUT
from torch import Tensor
from typing_extensions import override

RandomNumbers = dict[str, Tensor]
"""The state of each generator of one process, by its name."""


class RandomState(Callback):
    """Keeps the random numbers of training in the checkpoint: Python's, NumPy's, torch's, the device's; rank by rank.

    They belong to the training batches alone. What validation and the start of an epoch draw is undone before the next
    batch, so a network with dropout trains the same whether or not a run validates, and resumed or not. (A transform
    that draws from these generators while it loads data is not covered: seed one by the document and the epoch.)

    A run that is resumed with more ranks than it had gives the new ones random numbers of their own.
    """

    def __init__(self) -> None:
        self._after_batch: RandomNumbers | None = None
        self._drawn_elsewhere = False

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage == "fit":
            self._after_batch = None

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._after_batch is None:
            self._after_batch = random_numbers(pl_module.device)
        self._drawn_elsewhere = True

    @override
    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        if self._drawn_elsewhere and self._after_batch is not None:
            restore_random_numbers(self._after_batch, pl_module.device)
        self._drawn_elsewhere = False

    @override
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: STEP_OUTPUT, batch: Any, batch_idx: int
    ) -> None:
        self._after_batch = random_numbers(pl_module.device)

    @override
    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._drawn_elsewhere = True

    @override
    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._drawn_elsewhere = True

    @override
    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        mine = self._after_batch if self._drawn_elsewhere else None
        checkpoint["random_numbers"] = _gathered(mine or random_numbers(pl_module.device), trainer.world_size)

    @override
    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        saved = checkpoint.get("random_numbers", [])
        if trainer.global_rank < len(saved):
            self._after_batch = saved[trainer.global_rank]
        else:
            rank_zero_warn(
                f"the checkpoint has random numbers for {len(saved)} of {trainer.world_size} ranks: the others, and so "
                "the run, do not go on exactly"
            )


def random_numbers(device: torch.device) -> RandomNumbers:
    """The state of every generator of this process, as tensors, which a checkpoint may hold without running code."""
    version, words, gauss = random.getstate()
    _, keys, position, has_gauss, cached = np.random.get_state(legacy=True)
    state = {
        "python": torch.tensor([version, *words]),
        "numpy": torch.from_numpy(np.asarray(keys).astype(np.int64)),
        "numpy_position": torch.tensor([int(position), int(has_gauss)]),
        "gauss": torch.tensor([gauss is not None, gauss or 0.0, cached], dtype=torch.float64),
        "torch": torch.get_rng_state(),
    }
    if device.type != "cpu":
        state[device.type] = torch.get_device_module(device).get_rng_state(device)
    return state


def restore_random_numbers(state: RandomNumbers, device: torch.device) -> None:
    """Set every generator of this process to what `random_numbers` gave."""
    version, *words = state["python"].tolist()
    has_python_gauss, gauss, cached = state["gauss"].tolist()
    random.setstate((version, tuple(words), gauss if has_python_gauss else None))
    keys = state["numpy"].cpu().numpy().astype(np.uint32)
    position, has_gauss = state["numpy_position"].tolist()
    np.random.set_state(("MT19937", keys, position, has_gauss, cached))
    torch.set_rng_state(state["torch"].cpu())
    if device.type in state:
        torch.get_device_module(device).set_rng_state(state[device.type].cpu(), device)


def _gathered(mine: RandomNumbers, world_size: int) -> list[RandomNumbers]:
    """Every rank's, in the order of ranks."""
    if world_size == 1:
        return [mine]
    everyone: list[Any] = [None] * world_size
    torch.distributed.all_gather_object(everyone, mine)
    return everyone
