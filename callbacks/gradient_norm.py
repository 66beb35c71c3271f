"""GradientNorm: how large the gradient is, before it is clipped."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from lightning.pytorch import Callback, Trainer
from torch import nn
from torch.optim import Optimizer
from typing_extensions import override

from lightllm.models.anatomy import blocks
from lightllm.parallel.clipping import gradient_norm
from lightllm.parallel.spreading import SpreadsWeights

if TYPE_CHECKING:
    from lightllm.modules.base import LanguageModule


class GradientNorm(Callback):
    """Logs the 2-norm of the gradient of the step's mean loss as `train/gradient_norm`, before clipping.

    It is computed in the steps that are logged. FSDP 1 and DeepSpeed keep gradients to themselves; for those it logs
    what a rank sees.

    Args:
        per_block: Log each block's norm too, as `gradient_norm/block_00`, …, and that of everything else as
            `gradient_norm/rest`.
    """

    def __init__(self, per_block: bool = False) -> None:
        self.per_block = per_block

    @override
    def on_before_optimizer_step(  # type: ignore[override]  # a module with a network
        self, trainer: Trainer, pl_module: LanguageModule, optimizer: Optimizer
    ) -> None:
        every: int = trainer.log_every_n_steps  # type: ignore[attr-defined]
        if every == 0 or (trainer.global_step + 1) % every:
            return
        groups = {"rest": list(pl_module.parameters())}
        if self.per_block:
            groups = _parameters_per_block(pl_module.built_network)
        strategy = trainer.strategy
        norm = strategy.gradient_norm if isinstance(strategy, SpreadsWeights) else gradient_norm
        norms = {name: norm(parameters) for name, parameters in groups.items()}
        total = torch.linalg.vector_norm(torch.stack(list(norms.values())))
        pl_module.log("train/gradient_norm", total)
        if self.per_block:
            pl_module.log_dict({f"gradient_norm/{name}": norm for name, norm in norms.items()})


def _parameters_per_block(network: nn.Module) -> dict[str, list[nn.Parameter]]:
    stack = blocks(network)
    digits = max(2, len(str(len(stack) - 1)))
    groups = {f"block_{index:0{digits}}": list(block.parameters()) for index, block in enumerate(stack)}
    inside = {parameter for parameters in groups.values() for parameter in parameters}
    return groups | {"rest": [parameter for parameter in network.parameters() if parameter not in inside]}
