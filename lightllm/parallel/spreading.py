"""What the rest of the toolkit asks of a strategy under which a rank has parts of the weights only."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence

from lightning.pytorch.strategies import Strategy
from torch import nn

from lightllm.models.adapters import Adapter
from lightllm.models.transformation import Transformation


class SpreadsWeights(ABC):
    """A strategy under which no rank has all weights whole between steps."""

    @abstractmethod
    def check_composition(self, adapter: Adapter, transformations: Sequence[Transformation]) -> None:
        """Refuse what does not go with it, before a network is loaded.

        Raises:
            ValueError: The message says why, and what does.
        """

    @abstractmethod
    def clip_gradients(self, parameters: Iterable[nn.Parameter], largest_norm: float) -> None:
        """Scale the gradients so that their 2-norm, over all ranks together, is at most `largest_norm`."""


def require_whole_network(strategy: Strategy, name: str, why: str) -> None:
    """Refuse a part that uses the network beside the training steps, where no rank has it whole.

    Args:
        strategy: The trainer's.
        name: The part's.
        why: What it does with the network, to follow its name.

    Raises:
        ValueError: The strategy spreads the weights.
    """
    if isinstance(strategy, SpreadsWeights):
        raise ValueError(
            f"{name} {why}, and under {type(strategy).__name__} no rank has all of it: leave {name} out, or train "
            "with strategy ddp"
        )
