"""What the rest of the toolkit asks of a strategy under which a rank has parts of the weights only."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager

from torch import nn
from torch.distributed.fsdp import FSDPModule

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
