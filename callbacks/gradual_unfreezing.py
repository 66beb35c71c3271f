"""GradualUnfreezing: frozen layers begin to train one by one, from the top."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

import torch
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.strategies import DDPStrategy
from torch import nn
from torch.optim import Optimizer
from typing_extensions import override

from lightllm.models.anatomy import blocks, has_adapter, input_embedding

if TYPE_CHECKING:
    from lightllm.modules.base import LanguageModule


class GradualUnfreezing(Callback):
    """Thaws what the adapter `Frozen` froze, block by block from the top and the token embedding last.

    The lower a layer, the lower its learning rate: that of the head times `learning_rate_factor` per layer in between,
    also for the layers that train from the start (ULMFiT, arXiv:1801.06146, where it is 1 / 2.6 in a network of three
    layers; deep ones take about 0.9).

    The optimizer holds every layer from the beginning, in one group a layer, and passes over those without gradients;
    which layers are thawed follows from the step alone. So a run resumes exactly, whatever was thawed when it stopped.

    Args:
        every_n_steps: Thaw one more layer after so many optimizer steps; at the end of each epoch when None.
        learning_rate_factor: Ratio of a layer's learning rate to that of the layer above; 1 gives all the same.
    """

    def __init__(self, every_n_steps: int | None = None, learning_rate_factor: float = 0.9) -> None:
        if every_n_steps is not None and every_n_steps < 1:
            raise ValueError(f"every_n_steps is at least 1, not {every_n_steps}")
        if not 0 < learning_rate_factor <= 1:
            raise ValueError(f"learning_rate_factor is above 0 and at most 1, not {learning_rate_factor}")
        self.every_n_steps = every_n_steps
        self.learning_rate_factor = learning_rate_factor
        self._frozen: list[list[nn.Parameter]] = []
        self._num_thawed = 0
        self._make: Callable[[Any], Optimizer] | None = None

    @override
    def setup(self, trainer: Trainer, pl_module: LanguageModule, stage: str) -> None:  # type: ignore[override]
        if stage != "fit":
            return
        self._make = make = pl_module.optimizer

        def make_with_all_layers(groups: Iterable[dict[str, Any]]) -> Optimizer:
            return self._optimizer(pl_module.built_network, make, list(groups))

        # The field by which a module makes its optimizer: its schedule then sees every group.
        pl_module.optimizer = make_with_all_layers

    @override
    def teardown(self, trainer: Trainer, pl_module: LanguageModule, stage: str) -> None:  # type: ignore[override]
        self._frozen = []
        if self._make is not None:
            pl_module.optimizer, self._make = self._make, None

    @override
    def on_train_batch_start(self, trainer: Trainer, pl_module: LanguageModule, batch: Any, batch_idx: int) -> None:  # type: ignore[override]
        due = trainer.current_epoch if self.every_n_steps is None else trainer.global_step // self.every_n_steps
        for layer in self._frozen[self._num_thawed : due]:
            for parameter in layer:
                parameter.requires_grad_(True)
            self._num_thawed += 1

    @override
    def on_after_backward(self, trainer: Trainer, pl_module: LanguageModule) -> None:  # type: ignore[override]
        # DistributedDataParallel reduces only what trained when it wrapped the network.
        if not isinstance(trainer.strategy, DDPStrategy) or trainer.fit_loop._should_accumulate():
            return
        for layer in self._frozen[: self._num_thawed]:
            for parameter in layer:
                if parameter.grad is not None:
                    torch.distributed.all_reduce(parameter.grad)
                    parameter.grad /= trainer.world_size

    def _optimizer(
        self, network: nn.Module, make: Callable[[Any], Optimizer], groups: list[dict[str, Any]]
    ) -> Optimizer:
        """Make the optimizer of all layers: each group is cut into one a layer, with the frozen ones added."""
        if has_adapter(network):
            raise ValueError("GradualUnfreezing would train what the adapter leaves alone: take the adapter Frozen")
        layers = layers_from_the_top(network)
        frozen = [[parameter for parameter in layer if not parameter.requires_grad] for layer in layers]
        self._frozen = [layer for layer in frozen if layer]
        self._num_thawed = 0
        if not self._frozen:
            raise ValueError("nothing is frozen, so GradualUnfreezing has nothing to thaw: take the adapter Frozen")
        # A frozen matrix is decayed like the matrices that train; a frozen norm, like the norms that train, is not.
        group_of = {p: number for number, group in enumerate(groups) for p in group["params"]}
        number_by_dimensions = {p.ndim: number for p, number in group_of.items()}
        cut, depths = [], []
        for depth, layer in enumerate(layers):
            for number, group in enumerate(groups):
                members = [p for p in layer if group_of.get(p, number_by_dimensions.get(p.ndim, 0)) == number]
                if members:
                    cut.append({**group, "params": members})
                    depths.append(depth)
        optimizer = make(cut)
        for depth, group in zip(depths, optimizer.param_groups, strict=True):
            group["lr"] *= self.learning_rate_factor**depth
        return optimizer


def layers_from_the_top(network: nn.Module) -> list[list[nn.Parameter]]:
    """Return the parameters by layer: what is neither block nor embedding (head, norms), blocks, token embedding.

    A head that is tied to the embedding counts as embedding.
    """
    embedding = list(input_embedding(network).parameters())
    below = [list(block.parameters()) for block in reversed(blocks(network))]
    placed = {parameter for layer in [*below, embedding] for parameter in layer}
    return [[parameter for parameter in network.parameters() if parameter not in placed], *below, embedding]
