"""ExportBest: the best network so far, always there to be used."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.strategies import DeepSpeedStrategy, FSDPStrategy, ModelParallelStrategy
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_info
from typing_extensions import override

if TYPE_CHECKING:
    from lightllm.modules.base import LanguageModule


class ExportBest(Callback):
    """Exports the network to `RUN/export` after each validation that was better than all before.

    Training goes on as if nothing had happened. What is written is read back and compared (see
    `lightllm.export.export`), which takes the time of loading the network once. The best value is part of the
    checkpoint.

    Args:
        monitor: The logged metric that tells the best.
        mode: Whether the best is the lowest (min) or the highest (max).
        layout: `merged`, an ordinary Hugging Face folder, `adapter`, peft's, or `factored`, one of thin matrices.
    """

    def __init__(
        self,
        monitor: str = "val/loss",
        mode: Literal["min", "max"] = "min",
        layout: Literal["merged", "adapter", "factored"] = "merged",
    ) -> None:
        self.monitor = monitor
        self.mode = mode
        self.layout = layout
        self._best = math.inf

    @override
    def state_dict(self) -> dict[str, Any]:
        return {"best": self._best}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._best = state_dict["best"]

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if isinstance(trainer.strategy, (ModelParallelStrategy, FSDPStrategy, DeepSpeedStrategy)):
            raise ValueError(
                f"ExportBest needs the whole network on one rank, and {type(trainer.strategy).__name__} shards it: "
                "leave it out and run lightllm export when training is over"
            )

    @override
    def on_validation_end(self, trainer: Trainer, pl_module: LanguageModule) -> None:  # type: ignore[override]
        if trainer.sanity_checking or trainer.state.fn != TrainerFn.FITTING:
            return
        if self.monitor not in trainer.callback_metrics:
            known = ", ".join(sorted(trainer.callback_metrics))
            raise ValueError(f"ExportBest monitors {self.monitor!r}, which is not logged; there are: {known}")
        value = float(trainer.callback_metrics[self.monitor])
        cost = value if self.mode == "min" else -value
        if not cost < self._best:  # nor when it is no number
            return
        self._best = cost
        if not trainer.is_global_zero:
            return
        from lightllm.export import (  # with peft, a second, that `lightllm fit --help` has no need of
            classifier_of,
            export,
        )

        if pl_module.tokenizer is None:
            raise ValueError("ExportBest needs a tokenizer, and neither the data nor the network has one")
        folder = Path(trainer.default_root_dir) / "export"
        with torch.random.fork_rng():
            classifier = classifier_of(pl_module)
            export(pl_module.built_network, pl_module.tokenizer, folder, layout=self.layout, classifier=classifier)
        rank_zero_info(
            f"step {trainer.global_step}: {self.monitor} {value:.4g} is the best so far, exported to {folder}"
        )
