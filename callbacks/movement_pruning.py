"""MovementPruning: weights that training moves towards zero go."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

import torch
from lightning.pytorch import Trainer
from torch.optim import Optimizer
from typing_extensions import override

from lightllm.callbacks.own_learning_rate import OwnLearningRate
from lightllm.callbacks.pruning import Pruning
from lightllm.compression.effective_weight import EffectiveLayer
from lightllm.compression.masks import Amount, Pattern, layer_mask, network_masks
from lightllm.compression.movement import LearnedMask, MaskLearning, learned_masks
from lightllm.compression.sparsity_schedule import Moment, Shape

if TYPE_CHECKING:
    from lightllm.models.transformation import Transformation
    from lightllm.modules.base import LanguageModule


class MovementPruning(Pruning):
    """Prunes the weights whose learned scores are lowest (arXiv:2005.07683); see `Pruning`.

    A score grows while training moves its weight away from zero, and falls while it moves it there; under LoRA, the
    merged weight. While the schedule runs, a masked weight stays what it was, its score goes on being learned, and it
    comes back if that rises. At the end of the schedule the mask is fixed and masked weights are zero. It is made for
    fine-tuning, which moves weights little: how large they are says then mostly what pretraining needed them for.

    The scores take a number for each weight, with the optimizer's own for that: about the memory of full training,
    under LoRA too. Their gradients count when gradients are clipped.

    Args:
        sparsity: See `Pruning`.
        pattern: See `Pruning`; with `schedule: one_shot`, after the scores have been learned until `begin`.
        budget: `layer` prunes the same share of each layer; `network` the lowest scores of all, wherever they are.
        score_learning_rate: Of the scores, from which the run's schedule starts as from the other rate.
        schedule: See `Pruning`.
        begin: See `Pruning`; the scores are learned from the first step.
        end: See `Pruning`.
        common: The other fields of `Pruning`.

    Raises:
        ValueError: See `Pruning`; a pattern with the budget of the network, or a learning rate that is none.
    """

    def __init__(
        self,
        sparsity: float | None = None,
        pattern: str | None = None,
        budget: Literal["layer", "network"] = "layer",
        score_learning_rate: float = 1e-2,
        schedule: Shape = "cubic",
        begin: Moment = 0.05,
        end: Moment = 0.7,
        **common: Any,
    ) -> None:
        super().__init__(sparsity, pattern, schedule=schedule, begin=begin, end=end, **common)
        if self.pattern is not None and budget == "network":
            raise ValueError(f"{self.pattern} prunes the same share of every layer: set budget to layer")
        if not score_learning_rate > 0:
            raise ValueError(f"score_learning_rate is {score_learning_rate}: give one above 0, such as 0.01")
        self.budget = budget
        self.score_learning_rate = score_learning_rate
        self._own_rate: OwnLearningRate | None = None

    @override
    def transformation(self) -> Transformation:
        return MaskLearning(type(self).__name__, self.leave_out)

    @override
    def setup(self, trainer: Trainer, pl_module: LanguageModule, stage: str) -> None:  # type: ignore[override]
        super().setup(trainer, pl_module, stage)
        if stage == "fit":
            self._own_rate = OwnLearningRate(
                pl_module, lambda network: [mask.scores for mask in learned_masks(network)], self.score_learning_rate
            )

    @override
    def teardown(self, trainer: Trainer, pl_module: LanguageModule, stage: str) -> None:  # type: ignore[override]
        if self._own_rate is not None:
            self._own_rate.undo()
            self._own_rate = None

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LanguageModule) -> None:  # type: ignore[override]
        super().on_train_start(trainer, pl_module)
        assert self._schedule is not None
        if self._schedule.last == 0:
            raise ValueError("all is to be pruned at step 0, before any score is learned: set begin later")

    @override
    def on_before_optimizer_step(  # type: ignore[override]
        self, trainer: Trainer, pl_module: LanguageModule, optimizer: Optimizer
    ) -> None:
        for mask in self._masks().values():
            if mask.fixed:
                mask.scores.grad = None  # learned no more, and no part of what is clipped

    @override
    def on_train_batch_end(  # type: ignore[override]
        self, trainer: Trainer, pl_module: LanguageModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)
        self._zero_fixed()

    @override
    def prune(self, pl_module: LanguageModule, layers: dict[str, EffectiveLayer], amount: Amount) -> None:
        masks = self._masks()
        scores = {name: mask.scores.detach() for name, mask in masks.items()}
        if self.budget == "network" and not isinstance(amount, Pattern):
            keeps = network_masks(scores, amount)
        else:
            keeps = {name: layer_mask(one, amount) for name, one in scores.items()}
        assert self._schedule is not None
        for name, mask in masks.items():
            mask.mask.keep.copy_(keeps[name])
            if pl_module.trainer.global_step == self._schedule.last:
                mask.fix()
        self._zero_fixed()

    def _masks(self) -> dict[str, LearnedMask]:
        masks = {name: layer.effect.masking for name, layer in self._layers.items()}
        return {name: mask for name, mask in masks.items() if isinstance(mask, LearnedMask)}

    @torch.no_grad()
    def _zero_fixed(self) -> None:
        """Zero weights that train under a fixed mask: an optimizer's momentum goes on moving them for a while."""
        for name, mask in self._masks().items():
            weight = self._layers[name].base.weight
            if mask.fixed and weight.requires_grad:
                weight.mul_(mask.mask.keep)
