"""What the rest of the toolkit asks of a strategy under which a rank has parts of the weights only."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import ClassVar

from lightning.pytorch.strategies import Strategy
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

from lightllm.models.adapters import Adapter
from lightllm.models.transformation import Transformation


class SpreadsWeights(ABC):
    """A strategy under which no rank has all weights whole between steps."""

    gathers_network: ClassVar[bool]
    """Whether the whole network runs on every rank, on weights that are gathered where they are needed."""

    @abstractmethod
    def check_composition(self, adapter: Adapter, transformations: Sequence[Transformation]) -> None:
        """Refuse what does not go with it, before a network is loaded.

        Raises:
            ValueError: The message says why, and what does.
        """

    @abstractmethod
    def clip_gradients(self, parameters: Iterable[nn.Parameter], largest_norm: float) -> None:
        """Scale the gradients so that their 2-norm, over all ranks together, is at most `largest_norm`."""

    @abstractmethod
    def gradient_norm(self, parameters: Iterable[nn.Parameter]) -> Tensor:
        """The 2-norm of some gradients over all ranks together, a float32 scalar; every rank must call it."""


def require_network(strategy: Strategy, name: str, why: str) -> None:
    """Refuse a part that uses the network beside the training steps, where no rank could run it.

    Args:
        strategy: The trainer's.
        name: The part's.
        why: What it does with the network, to follow its name.

    Raises:
        ValueError: A rank has some layers of it only.
    """
    if isinstance(strategy, SpreadsWeights) and not strategy.gathers_network:
        raise ValueError(
            f"{name} {why}, and under {type(strategy).__name__} a rank has some layers of it only: leave {name} out, "
            "and ask the run afterwards (lightllm generate), or take another strategy"
        )


def require_equal_calls(strategy: Strategy, name: str, why: str) -> None:
    """Refuse a part whose ranks call the network unequally often, where its layers are gathered when they run.

    Args:
        strategy: The trainer's.
        name: The part's.
        why: What its ranks do, to follow its name.

    Raises:
        ValueError: A rank would wait for layers of another that is not there.
    """
    if isinstance(strategy, SpreadsWeights):
        raise ValueError(
            f"{name} {why}, and under {type(strategy).__name__} ranks have to call the network equally often: train "
            f"with strategy ddp, or without {name}"
        )


@contextmanager
def as_in_a_step(module: nn.Module) -> Iterator[None]:
    """Within it, a network can be used as within a training step, though its weights are sharded.

    Every rank must enter it and call the network's blocks equally often: they are gathered when they run.
    """
    if not isinstance(module, FSDPModule):
        yield
        return
    module._get_fsdp_state()._lazy_init()  # or the first block that runs would take itself for the outermost module
    module.unshard()
    try:
        yield
    finally:
        module.reshard()
