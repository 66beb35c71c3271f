"""What the trainer decides about batches: the ranks that share them, and how many of them make a step or an epoch."""

from __future__ import annotations

from typing import NamedTuple

from lightning.pytorch import Trainer
from lightning.pytorch.trainer.states import TrainerFn


class RunLayout(NamedTuple):
    """The part of a trainer that a datamodule depends on."""

    rank: int = 0
    """Place of this process among those that take different data."""
    num_ranks: int = 1
    accumulate: int = 1
    """Batches of an optimizer step, on each rank."""
    epoch_length: int | float = 1.0
    """Batches, or share of all, that training takes in an epoch."""
    reshuffle: bool = True
    """Every epoch has an order of its own."""
    bounded: bool = False
    """Training ends, or its epochs do, by a number of steps or batches."""


def run_layout(trainer: Trainer | None) -> RunLayout:
    """Read off a trainer; without one, a single process takes all batches."""
    if trainer is None:
        return RunLayout()
    # The strategy knows which ranks take different data: those of one tensor-parallel group, say, take the same.
    ranks = trainer.distributed_sampler_kwargs or {"rank": trainer.global_rank, "num_replicas": trainer.world_size}
    return RunLayout(
        rank=ranks["rank"],
        num_ranks=ranks["num_replicas"],
        accumulate=trainer.accumulate_grad_batches,
        epoch_length=trainer.limit_train_batches,
        reshuffle=not trainer.overfit_batches,  # type: ignore[attr-defined]  # it is set from outside of the class
        bounded=trainer.max_steps > 0 or isinstance(trainer.limit_train_batches, int),
    )


def batches_taken(epoch_length: int | float, num_batches: int) -> int:
    """Batches that training takes of an epoch that has `num_batches`, as Lightning counts them."""
    return min(epoch_length, num_batches) if isinstance(epoch_length, int) else int(num_batches * epoch_length)


def splits_to_read(trainer: Trainer | None, has_val: bool, has_test: bool) -> list[str]:
    """The splits that the coming stage reads; without a trainer, all that there are.

    Raises:
        ValueError: There is none to validate, test or predict on.
    """
    stage = TrainerFn.FITTING if trainer is None else trainer.state.fn
    if stage == TrainerFn.FITTING:
        tested = ["test"] if trainer is None and has_test else []
        return ["train", *(["val"] if has_val else []), *tested]
    if stage == TrainerFn.VALIDATING and not has_val:
        raise ValueError("there is nothing to validate on: set data.val, or reading.val_fraction above 0")
    if stage == TrainerFn.TESTING and not has_test:
        raise ValueError("there is nothing to test on: set data.test")
    if stage == TrainerFn.PREDICTING and not (has_test or has_val):
        raise ValueError("there is nothing to predict on: set data.test or data.val")
    return ["val"] if stage == TrainerFn.VALIDATING or not has_test else ["test"]
