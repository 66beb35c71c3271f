"""How sparse a network is at each optimizer step."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Shape = Literal["one_shot", "cubic"]
"""one_shot: all at once, at the begin; cubic: fast at first, when most weights are redundant, and slower to the end."""

Moment = int | float
"""A point in a run: a whole number is an optimizer step, a float between 0.0 and 1.0 a share of all steps."""


def step_of(moment: Moment, num_steps: int | None, name: str) -> int:
    """Return the number of optimizer steps that were done at a moment of the run.

    Args:
        moment: Steps, or a share of the run's steps, which is rounded to whole ones.
        num_steps: Optimizer steps of the run; None if nobody knows.
        name: What the error calls the moment.

    Raises:
        ValueError: It is negative or beyond the end, or a share of nobody knows what.
    """
    if isinstance(moment, int):
        if moment < 0 or (num_steps is not None and moment > num_steps):
            raise ValueError(
                f"{name} is step {moment}, and the run has steps 0 to {num_steps}: name one of them, or a share such "
                "as 0.5"
            )
        return moment
    if not 0.0 <= moment <= 1.0:
        raise ValueError(
            f"{name} is {moment}, which is no share of the run: give 0.0 to 1.0, or a step as a whole number"
        )
    if moment == 0.0:
        return 0
    if num_steps is None:
        raise ValueError(
            f"{name} is {moment} of a run whose length nobody knows (a stream without max_steps): set "
            "trainer.max_steps, or give a whole number of steps"
        )
    return round(moment * num_steps)


@dataclass(frozen=True)
class SparsitySchedule:
    """Sparsity over optimizer steps; the number is what holds after so many steps, before the next."""

    shape: Shape
    sparsity: float
    """At the end, between 0 and 1."""
    begin: int
    """The step from which weights are pruned: `one_shot` prunes all of them there."""
    end: int
    """The step at which `cubic` reaches `sparsity`; `one_shot` has no use for it."""
    every: int = 1
    """Steps between the prunings of `cubic`; the last is at `end` in any case."""

    def __post_init__(self) -> None:
        if not 0 <= self.sparsity <= 1:
            raise ValueError(f"a sparsity of {self.sparsity} is not a share of the weights: give 0 to 1")
        if self.every < 1:
            raise ValueError(f"weights are pruned every {self.every} steps: give at least 1")
        if self.shape == "cubic" and self.end <= self.begin:
            raise ValueError(
                f"cubic pruning begins at step {self.begin} and ends at {self.end}: end it later, or take one_shot"
            )

    @property
    def last(self) -> int:
        """The step at which weights are pruned for the last time; the mask is fixed from there on."""
        return self.begin if self.shape == "one_shot" else self.end

    def prunes_at(self, step: int) -> bool:
        """Whether weights are pruned after so many steps."""
        if self.shape == "one_shot":
            return step == self.begin
        return step == self.end or (self.begin <= step < self.end and (step - self.begin) % self.every == 0)

    def at(self, step: int) -> float:
        """Return the sparsity that is due after so many steps.

        Cubic (Zhu & Gupta, arXiv:1710.01878): `s * (1 - (1 - (t - begin) / (end - begin)) ** 3)`, which is 0 at the
        begin; between two prunings, that of the last one.
        """
        if step < self.begin:
            return 0.0
        if self.shape == "one_shot" or step >= self.end:
            return self.sparsity
        pruned_at = step - (step - self.begin) % self.every
        return self.sparsity * (1 - (1 - (pruned_at - self.begin) / (self.end - self.begin)) ** 3)
