"""Random numbers go on where they were when a run is resumed."""

from __future__ import annotations

import random
from typing import Any, NamedTuple

import numpy as np
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_warn
from lightning.pytorch.utilities.types import STEP_OUTPUT
from torch import Tensor
from typing_extensions import override


class RandomNumbers(NamedTuple):
    """The state of every generator of one process, as the generators give it, which takes microseconds."""

    python: tuple[Any, ...]
    numpy: tuple[Any, ...]
    cpu: Tensor
    accelerator: Tensor | None
    """None where there is none."""

    @classmethod
    def now(cls, device: torch.device) -> RandomNumbers:
        """The state of this process; `device` is the accelerator it uses, or the CPU."""
        own = None if device.type == "cpu" else torch.get_device_module(device).get_rng_state(device)
        return cls(random.getstate(), tuple(np.random.get_state(legacy=True)), torch.get_rng_state(), own)

    def restore(self, device: torch.device) -> None:
        """Set the generators of this process."""
        random.setstate(self.python)
        np.random.set_state(self.numpy)
        torch.set_rng_state(self.cpu)
        if self.accelerator is not None and device.type != "cpu":
            torch.get_device_module(device).set_rng_state(self.accelerator, device)

    def as_tensors(self) -> dict[str, Tensor]:
        """In a form that is read from a file without running code."""
        version, words, gauss = self.python
        _, keys, position, has_gauss, cached = self.numpy
        tensors = {
            "python": torch.tensor([version, *words]),
            "numpy": torch.from_numpy(keys.astype(np.int64)),
            "numpy_position": torch.tensor([position, has_gauss]),
            "gauss": torch.tensor([gauss is not None, gauss or 0.0, cached], dtype=torch.float64),
            "cpu": self.cpu,
        }
        return tensors if self.accelerator is None else {**tensors, "accelerator": self.accelerator}

    @classmethod
    def from_tensors(cls, tensors: dict[str, Tensor]) -> RandomNumbers:
        """What `as_tensors` was called on."""
        tensors = {name: tensor.cpu() for name, tensor in tensors.items()}
        version, *words = tensors["python"].tolist()
        has_gauss, gauss, cached = tensors["gauss"].tolist()
        keys = tensors["numpy"].numpy().astype(np.uint32)
        return cls(
            (version, tuple(words), gauss if has_gauss else None),
            ("MT19937", keys, *tensors["numpy_position"].tolist(), cached),
            tensors["cpu"],
            tensors.get("accelerator"),
        )


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
            self._after_batch = RandomNumbers.now(pl_module.device)
        self._drawn_elsewhere = True

    @override
    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        if self._drawn_elsewhere and self._after_batch is not None:
            self._after_batch.restore(pl_module.device)
        self._drawn_elsewhere = False

    @override
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: STEP_OUTPUT, batch: Any, batch_idx: int
    ) -> None:
        self._after_batch = RandomNumbers.now(pl_module.device)

    @override
    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._drawn_elsewhere = True

    @override
    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._drawn_elsewhere = True

    @override
    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        elsewhere = self._after_batch if self._drawn_elsewhere else None
        numbers = elsewhere or RandomNumbers.now(pl_module.device)
        checkpoint["random_numbers"] = _gathered(numbers.as_tensors(), trainer.world_size)

    @override
    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        if trainer.state.fn != TrainerFn.FITTING:
            return
        saved = checkpoint.get("random_numbers", [])
        if trainer.global_rank < len(saved):
            self._after_batch = RandomNumbers.from_tensors(saved[trainer.global_rank])
        else:
            rank_zero_warn(
                f"the checkpoint has random numbers for {len(saved)} of {trainer.world_size} ranks: the others, and so "
                "the run, do not go on exactly"
            )


def _gathered(mine: dict[str, Tensor], world_size: int) -> list[dict[str, Tensor]]:
    """Every rank's, in the order of ranks."""
    if world_size == 1:
        return [mine]
    everyone: list[Any] = [None] * world_size
    torch.distributed.all_gather_object(everyone, mine)
    return everyone
