"""The learning rate over a run."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR, LRScheduler


@dataclass(frozen=True)
class Schedule:
    """The learning rate as a share of the optimizer's, per optimizer step.

    After `step` optimizer steps it is

        step / warmup                                       within the warm-up
        1                                                   until the fall begins
        floor + (1 - floor) * (1 - x)                       in a linear fall
        floor + (1 - floor) * (1 + cos(pi * x)) / 2         in a cosine's

    with x the part of the fall that is over. `linear` and `cosine` fall from the end of the warm-up on,
    `warmup-stable-decay` falls linearly over the last `decay` steps, `constant` never.
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
        if total_steps is None:
            if self.needs_total:
                raise ValueError(
                    f"a {self.shape} schedule needs to know when the run ends: set trainer.max_steps, or "
                    "trainer.max_epochs with data whose length is known, or schedule.shape: constant"
                )
            return LambdaLR(optimizer, lambda step: self._factor(step, int(self.warmup), fall=0, total_steps=0))
        warmup = _steps(self.warmup, total_steps)
        match self.shape:
            case "constant":
                fall = 0
            case "warmup-stable-decay":
                fall = _steps(self.decay, total_steps)
            case _:
                fall = total_steps - warmup
        if warmup >= total_steps or warmup + fall > total_steps:
            raise ValueError(
                f"the schedule's warm-up of {warmup} steps{f' and decay of {fall}' if fall else ''} do not fit into a "
                f"run of {total_steps} steps: shorten them, or give them as shares of the run"
            )
        return LambdaLR(optimizer, lambda step: self._factor(step, warmup, fall, total_steps))

    def _factor(self, step: int, warmup: int, fall: int, total_steps: int) -> float:
        """The share after `step` optimizer steps; a fall of 0 steps never begins."""
        if step < warmup:
            return step / warmup
        if not fall:
            return 1.0
        over = min(max(step - (total_steps - fall), 0) / fall, 1.0)
        rest = (1 + math.cos(math.pi * over)) / 2 if self.shape == "cosine" else 1 - over
        return self.floor + (1 - self.floor) * rest


def _steps(length: float, total_steps: int) -> int:
    return round(length * total_steps) if length < 1 else int(length)
