"""Runs of a few steps that are stopped in the middle and gone on with, beside one that is not stopped."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path

import torch
from lightning.fabric.utilities.warnings import PossibleUserWarning
from lightning.pytorch import LightningDataModule, Trainer, seed_everything
from torch import Tensor

from lightllm.callbacks import Checkpoint, RandomState
from lightllm.checkpoint_io import newest_checkpoint
from lightllm.modules import LanguageModule


def weights_after(
    folder: Path,
    module: Callable[[], LanguageModule],
    data: Callable[[], LightningDataModule],
    steps: int,
) -> dict[str, Tensor]:
    """Train up to so many steps, from the newest checkpoint in the folder if there is one; the state at the end."""
    seed_everything(7)
    made = module()
    trainer = Trainer(
        default_root_dir=folder,
        accelerator="cpu",
        devices=1,
        max_steps=steps,
        max_epochs=-1,
        callbacks=[RandomState(), Checkpoint(every_n_train_steps=1)],
        logger=False,
        num_sanity_val_steps=0,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", PossibleUserWarning)
        newest = newest_checkpoint(folder / "checkpoints")
        trainer.fit(made, datamodule=data(), ckpt_path=newest, weights_only=True)
    assert trainer.global_step == steps
    return {name: value.detach().clone() for name, value in made.state_dict().items()}


def check_resumes(
    folder: Path, module: Callable[[], LanguageModule], data: Callable[[], LightningDataModule], steps: int = 5
) -> None:
    """Assert that a run that is stopped and gone on with twice ends with the very weights of one that is not."""
    whole = weights_after(folder / "whole", module, data, steps)
    for stop in (2, 3, steps):
        parts = weights_after(folder / "parts", module, data, stop)
    assert whole.keys() == parts.keys()
    for name, value in whole.items():
        assert value.isfinite().all(), name
        assert torch.equal(parts[name], value), name
