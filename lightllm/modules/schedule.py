"""The learning rate over a run."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler


@dataclass(frozen=True)
class Schedule:
    """The learning rate as a share of the optimizer's, per optimizer step.

    It rises linearly over the warm-up, then stays, falls, or stays and then falls, to `floor` at the last step.
    """

    shape: Literal["constant", "linear", "cosine", "warmup-stable-decay"] = "cosine"
    """What follows the warm-up."""
    warmup: float = 0.0
    """Length of the warm-up: steps if at least 1, else a share of the run; 0 is none."""
    decay: float = 0.2
    """Length of the decay of `warmup-stable-decay`, given like `warmup`."""
    floor: float = 0.0
    """The share of the learning rate that is left at the end."""

    def __post_init__(self) -> None:
        """Refuse lengths and shares that are none."""
        for name in ("warmup", "decay"):
            value = getattr(self, name)
            if value < 0 or (value > 1 and value != int(value)):
                raise ValueError(f"{name} is a number of steps or a share of the run below 1, not {value}")
        if not 0 <= self.floor <= 1:
            raise ValueError(f"floor is a share of the learning rate, between 0 and 1, not {self.floor}")

    @property
    def needs_total(self) -> bool:
        """Whether the run's length must be known."""
        return self.shape != "constant" or 0 < self.warmup < 1

    def scheduler(self, optimizer: Optimizer, total_steps: int | None) -> LRScheduler:
        """The torch scheduler, to be stepped after every optimizer step.

        Raises:
            ValueError: The run has no end and this schedule needs one, or it is shorter than warm-up and decay.
        """
        # These bring peft along, which takes a second, and nobody who asks for help needs it.
        from transformers.optimization import (
            get_constant_schedule_with_warmup,
            get_cosine_with_min_lr_schedule_with_warmup,
            get_wsd_schedule,
        )

        if total_steps is None:
            if self.needs_total:
                raise ValueError(
                    f"a {self.shape} schedule needs to know when the run ends: set trainer.max_steps, or "
                    "trainer.max_epochs with data whose length is known, or schedule.shape: constant"
                )
            return get_constant_schedule_with_warmup(optimizer, int(self.warmup))
        warmup = _steps(self.warmup, total_steps)
        decay = total_steps - warmup if self.shape == "linear" else _steps(self.decay, total_steps)
        if warmup >= total_steps or (self.shape == "warmup-stable-decay" and warmup + decay > total_steps):
            raise ValueError(
                f"the schedule's warm-up of {warmup} steps"
                f"{f' and decay of {decay}' if self.shape == 'warmup-stable-decay' else ''} do not fit into a run of "
                f"{total_steps} steps: shorten them, or give them as shares of the run"
            )
        match self.shape:
            case "constant":
                return get_constant_schedule_with_warmup(optimizer, warmup)
            case "cosine":
                return get_cosine_with_min_lr_schedule_with_warmup(
                    optimizer, warmup, total_steps, min_lr_rate=self.floor
                )
            case "linear" | "warmup-stable-decay":
                return get_wsd_schedule(
                    optimizer, warmup, decay, total_steps, decay_type="linear", min_lr_ratio=self.floor
                )


def _steps(length: float, total_steps: int) -> int:
    return round(length * total_steps) if length < 1 else int(length)
