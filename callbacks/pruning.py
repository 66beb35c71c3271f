"""Pruning: what all callbacks that prune weights have in common: which, when, how many, and that they stay pruned."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, Any

from lightning.pytorch import Trainer
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from torch.optim import Optimizer
from typing_extensions import override

from lightllm.callbacks.loop_position import at_optimizer_step, logged_step
from lightllm.callbacks.progress_bar import total_steps
from lightllm.callbacks.transforming import Transforming
from lightllm.compression.effective_weight import EffectiveLayer
from lightllm.compression.effects import effective_layers
from lightllm.compression.layers import prunable_layers
from lightllm.compression.masking import mask_of
from lightllm.compression.masks import Amount, Pattern, sparsity_of
from lightllm.compression.sparsity_schedule import Moment, Shape, SparsitySchedule, step_of

if TYPE_CHECKING:
    from lightllm.modules.base import LanguageModule


class Pruning(Transforming, ABC):
    """Prunes weights of the blocks' linear layers on a schedule; what is pruned is zero from then on.

    A leaf says how weights are chosen: `transformation` installs the masks, `prune` sets them.

    At step 0, weights are pruned after every callback's `on_train_start` and before the first batch; at a later step,
    right after it and before its validation and checkpoint. Weights that train are held at zero where they are pruned:
    their gradient before each optimizer step, so that it counts in no norm and no momentum, and the weight after it.
    Under LoRA, the mask is on the merged weight. A resumed run goes on with the masks of the checkpoint.

    Sparsity is logged whenever weights are pruned: `sparsity` of all these layers together, and `sparsity/LAYER`.

    Args:
        sparsity: The share of the weights to prune, between 0 and 1; or else `pattern`.
        pattern: N:M, such as "2:4": 2 of every 4 weights that follow each other along a layer's input stay.
        schedule: `one_shot` prunes all at `begin`; `cubic` a bit every `every_n_steps` from `begin` to `end`.
        begin: When: an optimizer step as a whole number, or a share of the run such as 0.1.
        end: When `cubic` has reached the sparsity, likewise; the rest of the run trains at the fixed mask.
        every_n_steps: Steps between the prunings of `cubic`.
        leave_out: Regular expressions of names of layers that are not pruned: ["down_proj", "layers.0."].

    Raises:
        ValueError: Neither or both of sparsity and pattern, or a schedule that cannot be.
    """

    def __init__(
        self,
        sparsity: float | None = None,
        pattern: str | None = None,
        schedule: Shape = "one_shot",
        begin: Moment = 0,
        end: Moment = 0.5,
        every_n_steps: int = 10,
        leave_out: list[str] | None = None,
    ) -> None:
        if (sparsity is None) == (pattern is None):
            raise ValueError(f"sparsity is {sparsity} and pattern {pattern}: give one of them, 0.5 or '2:4'")
        if pattern is not None and schedule != "one_shot":
            raise ValueError(f"a pattern comes all at once: set schedule to one_shot, not {schedule}")
        self.pattern = None if pattern is None else Pattern.parse(pattern)
        self.sparsity = self.pattern.sparsity if self.pattern is not None else float(sparsity or 0)
        self.shape = schedule
        self.begin = begin
        self.end = end
        self.every_n_steps = every_n_steps
        self.leave_out = leave_out or []
        # What can be wrong with it whatever the length of the run is wrong now.
        SparsitySchedule(schedule, self.sparsity, 0, 1, every_n_steps)
        self._schedule: SparsitySchedule | None = None
        self._layers: dict[str, EffectiveLayer] = {}
        self._pruned_at: int | None = None

    @property
    def pruned_layers(self) -> list[str]:
        """Names of the layers that it prunes, in the plain network; known once training starts."""
        return list(self._layers)

    @abstractmethod
    def prune(self, pl_module: LanguageModule, layers: dict[str, EffectiveLayer], amount: Amount) -> None:
        """Set the masks of layers so that they are pruned by an amount; what is pruned already must stay so.

        Args:
            pl_module: Whose network it is.
            layers: The layers, by name in the plain network.
            amount: The share of their weights that is to be pruned now, all in all, or the pattern.
        """

    @override
    def on_fit_start(self, trainer: Trainer, pl_module: LanguageModule) -> None:  # type: ignore[override]
        super().on_fit_start(trainer, pl_module)
        installed = effective_layers(pl_module.built_network)
        self._layers = {name: installed[name] for name in prunable_layers(pl_module.built_network, self.leave_out)}
        for other in trainer.callbacks:  # type: ignore[attr-defined]
            if isinstance(other, Pruning) and other is not self and (twice := set(self._layers) & set(other._layers)):
                raise ValueError(
                    f"{type(self).__name__} and {type(other).__name__} both prune {sorted(twice)[0]}: let one of them "
                    "leave it out"
                )
        for name, layer in self._layers.items():
            width = layer.base.in_features
            if self.pattern is not None and width % self.pattern.group:
                raise ValueError(
                    f"{name} has rows of {width} weights, which {self.pattern} cannot cut evenly: name it in leave_out"
                )

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LanguageModule) -> None:  # type: ignore[override]
        num_steps = total_steps(trainer, steps_before=0, epochs_before=0)
        begin, end = step_of(self.begin, num_steps, "begin"), step_of(self.end, num_steps, "end")
        if isinstance(self.end, float) and end == begin:
            end += 1  # of a run so short that both are the same step
        self._schedule = SparsitySchedule(self.shape, self.sparsity, begin, end, self.every_n_steps)

    @override
    def on_train_epoch_start(self, trainer: Trainer, pl_module: LanguageModule) -> None:  # type: ignore[override]
        self._prune_if_due(trainer, pl_module)

    @override
    def on_train_batch_start(  # type: ignore[override]
        self, trainer: Trainer, pl_module: LanguageModule, batch: Any, batch_idx: int
    ) -> None:
        self._prune_if_due(trainer, pl_module)  # resumed from a checkpoint that another callback made just before

    @override
    def on_before_optimizer_step(  # type: ignore[override]
        self, trainer: Trainer, pl_module: LanguageModule, optimizer: Optimizer
    ) -> None:
        if self._pruned_at is not None:
            for layer in self._trained():
                layer.hold_gradient()

    @override
    def on_train_batch_end(  # type: ignore[override]
        self, trainer: Trainer, pl_module: LanguageModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if not at_optimizer_step(trainer):
            return
        if self._pruned_at is not None:
            for layer in self._trained():
                layer.hold_weight()
        self._prune_if_due(trainer, pl_module)

    @override
    def state_dict(self) -> dict[str, Any]:
        return {"pruned_at": self._pruned_at}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._pruned_at = state_dict["pruned_at"]

    def _trained(self) -> list[EffectiveLayer]:
        return [layer for layer in self._layers.values() if layer.base.weight.requires_grad]

    def _prune_if_due(self, trainer: Trainer, module: LanguageModule) -> None:
        step = trainer.global_step
        assert self._schedule is not None
        if self._pruned_at == step or not self._schedule.prunes_at(step):
            return
        sparsity = self._schedule.at(step)
        if sparsity > 0:
            self.prune(module, self._layers, self.pattern or sparsity)
            self._report(trainer)
        self._pruned_at = step
        if step == self._schedule.last:
            self.announce(module)

    def _report(self, trainer: Trainer) -> None:
        """Log the sparsity of each layer and of all together, as that of the step that was just done."""
        masks = {name: mask_of(layer) for name, layer in self._layers.items()}
        shares = {name: 0.0 if keep is None else sparsity_of(keep) for name, keep in masks.items()}
        sizes = {name: layer.base.weight.numel() for name, layer in self._layers.items()}
        share = sum(shares[name] * size for name, size in sizes.items()) / sum(sizes.values())
        metrics = {"sparsity": share, **{f"sparsity/{name}": value for name, value in shares.items()}}
        for logger in trainer.loggers:
            logger.log_metrics(metrics, logged_step(trainer))
        rank_zero_info(f"step {trainer.global_step}: {share:.1%} of the weights of {len(shares)} layers are pruned")
