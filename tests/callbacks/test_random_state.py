from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.trainer.states import TrainerFn, TrainerState
from resumable_run import NotingModule, run, same_state
from typing_extensions import override

from lightllm.callbacks import Checkpoint, RandomState
from lightllm.callbacks.random_state import RandomNumbers

CPU = torch.device("cpu")


def draw() -> list[Any]:
    return [random.random(), random.gauss(0, 1), np.random.rand(), np.random.randn(), *torch.randn(3).tolist()]


@pytest.mark.parametrize("half_drawn", [False, True])
def test_restored_generators_draw_the_same(tmp_path: Path, half_drawn: bool) -> None:
    if half_drawn:  # normal numbers are drawn in pairs, and the second one is kept
        random.gauss(0, 1), np.random.randn()
    torch.save(RandomNumbers.now(CPU).as_tensors(), tmp_path / "state")
    drawn = draw()
    draw()
    RandomNumbers.from_tensors(torch.load(tmp_path / "state", weights_only=True)).restore(CPU)
    assert draw() == drawn


class Draws(Callback):
    """Draws from every generator in a hook."""

    def __init__(self, *hooks: str) -> None:
        for hook in hooks:
            setattr(self, hook, lambda *_: draw())


def test_what_validation_and_epochs_draw_changes_nothing(tmp_path: Path) -> None:
    quiet = run(tmp_path, [RandomState(), Checkpoint()])
    drawing = run(
        tmp_path,
        [RandomState(), Checkpoint(), Draws("on_validation_end", "on_train_epoch_end", "on_train_epoch_start")],
        validate=True,
        val_check_interval=2,
    )
    assert same_state(quiet, drawing)
    bare = run(tmp_path, [Checkpoint()], validate=True, val_check_interval=2)
    assert not same_state(quiet, bare)


def test_resumed_dropout_goes_on_whatever_was_drawn_before(tmp_path: Path) -> None:
    whole = run(tmp_path, [RandomState(), Checkpoint()])
    run(tmp_path, [RandomState(), Checkpoint(keep=9)], max_epochs=-1, max_steps=10)
    path = tmp_path / "checkpoints" / "step=10.ckpt"
    resumed = run(
        tmp_path, [Draws("on_train_start"), RandomState(), Checkpoint(keep=9), Draws("on_fit_start")], resume=path
    )
    assert same_state(whole, resumed)
    assert not same_state(whole, run(tmp_path, [Checkpoint(keep=9)], resume=path))


class OfTwoRanks(Callback):
    """Pretends that the checkpoint was written by so many ranks."""

    def __init__(self, ranks: int) -> None:
        self.ranks = ranks

    @override
    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        checkpoint["random_numbers"] = checkpoint["random_numbers"] * self.ranks


def test_rank_without_random_numbers_is_said(tmp_path: Path) -> None:
    run(tmp_path, [RandomState(), Checkpoint(keep=9)], max_epochs=1)
    path = tmp_path / "checkpoints" / "step=7.ckpt"
    run(tmp_path, [OfTwoRanks(2), RandomState(), Checkpoint(keep=9)], resume=path)
    with pytest.warns(UserWarning, match="0 of 1 ranks"):
        run(tmp_path, [OfTwoRanks(0), RandomState(), Checkpoint(keep=9)], resume=path)


def worker(rank: int, folder: Path) -> None:
    torch.distributed.init_process_group("gloo", f"file://{folder}/store", rank=rank, world_size=2)
    torch.manual_seed(rank)
    callback, checkpoint = RandomState(), {}  # type: ignore[var-annotated]

    class TwoRanks:
        world_size, global_rank = 2, rank
        state = TrainerState(fn=TrainerFn.FITTING)

    module = NotingModule()
    torch.manual_seed(rank)
    callback.on_save_checkpoint(TwoRanks(), module, checkpoint)  # type: ignore[arg-type]
    drawn = torch.randn(3)
    callback.on_load_checkpoint(TwoRanks(), module, checkpoint)  # type: ignore[arg-type]
    callback.on_train_start(TwoRanks(), module)  # type: ignore[arg-type]
    callback.on_train_batch_start(TwoRanks(), module, None, 0)  # type: ignore[arg-type]
    torch.save((drawn, torch.randn(3)), folder / f"{rank}.pt")
    torch.distributed.destroy_process_group()


def test_every_rank_gets_its_own_random_numbers_back(tmp_path: Path) -> None:
    torch.multiprocessing.start_processes(worker, (tmp_path,), nprocs=2, start_method="fork")
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in range(2))
    assert torch.equal(*first)
    assert torch.equal(*second)
    assert not torch.equal(first[0], second[0])
