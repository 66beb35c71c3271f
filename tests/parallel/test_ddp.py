"""Lightning's own `ddp` under our objectives: the same parameters as one process."""

from __future__ import annotations

from pathlib import Path

import pytest
from lightning.pytorch import Callback, LightningModule, Trainer
from parity import OBJECTIVES, MakeModule, assert_parity, fit, global_batches, pretraining
from ranks import run_on_ranks
from torch.nn.parallel import DistributedDataParallel

from lightllm.callbacks import MagnitudePruning

pytestmark = pytest.mark.filterwarnings("ignore::lightning.fabric.utilities.warnings.PossibleUserWarning")


@pytest.mark.parametrize("make", OBJECTIVES)
def test_two_ranks_are_one_process(tmp_path: Path, make: MakeModule) -> None:
    assert_parity(tmp_path, make, lambda: "ddp", 2)


class Watch(Callback):
    """Notes whether the first rank's buffers are sent to the others."""

    sends: bool

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        assert isinstance(trainer.strategy.model, DistributedDataParallel)
        self.sends = bool(trainer.strategy.model.broadcast_buffers)


def sends_buffers(folder: Path, callbacks: list[Callback]) -> bool:
    watch = Watch()
    batches = global_batches(1, steps=4)
    fit(folder, pretraining, batches, [*callbacks, watch], devices=2, strategy="ddp", use_distributed_sampler=False)
    return watch.sends


@pytest.mark.parametrize("callbacks", [[], [MagnitudePruning(0.5)]])
def test_masks_are_not_sent_at_every_forward_pass(tmp_path: Path, callbacks: list[Callback]) -> None:
    assert run_on_ranks(sends_buffers, 2, tmp_path, callbacks) == [not callbacks] * 2


def test_four_ranks_are_one_process(tmp_path: Path) -> None:
    assert_parity(tmp_path, pretraining, lambda: "ddp", 4)
