"""Transforming: what all callbacks that change the network have in common."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import TYPE_CHECKING

from lightning.pytorch import Callback, Trainer
from torch.nn.parallel import DistributedDataParallel
from typing_extensions import override

from lightllm.models.transformation import Transformation

if TYPE_CHECKING:
    from lightllm.modules.base import LanguageModule


class Transforming(Callback, ABC):
    """A callback that changes the network as it is built.

    At each hook, masks come before fake quantization, in whatever order the callbacks are listed.

    Whoever reads a run back (`export`, `generate`, …) makes the run's callbacks of this kind again and registers
    their transformations, without a trainer: `transformation` may need none, and calibrates in `apply` only.
    """

    @abstractmethod
    def transformation(self) -> Transformation:
        """The change."""

    def announce(self, pl_module: LanguageModule) -> None:
        """Say that what this callback does on a schedule is done; to be called once, right after the last of it.

        What is done while the network is built, before its adapter, is announced by the build pipeline.
        """
        pl_module.announcements.make(type(self).__name__, pl_module.built_network)

    @override
    def setup(self, trainer: Trainer, pl_module: LanguageModule, stage: str) -> None:  # type: ignore[override]
        pl_module.register_transformation(self.transformation())
        trainer.callbacks = in_order_of_kinds(trainer.callbacks)  # type: ignore[attr-defined]  # Lightning sets it late

    @override
    def on_fit_start(self, trainer: Trainer, pl_module: LanguageModule) -> None:  # type: ignore[override]
        # Masks and scales are the same on every rank, and DDP would send the first one's at every forward pass.
        if isinstance(trainer.strategy.model, DistributedDataParallel):
            trainer.strategy.model.broadcast_buffers = False


def in_order_of_kinds(callbacks: Sequence[Callback]) -> list[Callback]:
    """The callbacks with those that change the network in the order of their kinds, whatever order they are listed in.

    What happens at one step of a run then has one order: weights are masked before they are rounded. Those of one kind
    go by their names; all others stay where they are.
    """
    changing = [(one.transformation(), one) for one in callbacks if isinstance(one, Transforming)]
    ordered = iter(sorted(changing, key=lambda pair: (pair[0].kind, pair[0].name)))
    return [next(ordered)[1] if isinstance(one, Transforming) else one for one in callbacks]
