"""SparsityRegularization: a penalty draws weights, groups of weights or gates to zero while the network learns."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from lightning.pytorch import Trainer
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from torch.optim import Optimizer
from typing_extensions import override

from lightllm.callbacks.loop_position import at_optimizer_step, logged_step
from lightllm.callbacks.own_learning_rate import OwnLearningRate
from lightllm.callbacks.progress_bar import total_steps
from lightllm.callbacks.pruning import Pruning
from lightllm.callbacks.transforming import Transforming
from lightllm.compression.effects import effective_layers
from lightllm.compression.sparsification import Share, Sparsifier, Sparsifying, Sparsity
from lightllm.compression.sparsity_schedule import Moment, step_of
from lightllm.models.transformation import Transformation

if TYPE_CHECKING:
    from lightllm.modules.base import LanguageModule


class SparsityRegularization(Transforming):
    """Adds a penalty to the loss that makes weights zero; at the end, what is small enough is zero for good.

    What is optimised is the mean loss per target token plus `strength` times the penalty of the merged weights, however
    a step is cut into batches and ranks: the penalty's gradient, in closed form, is added once a step, to the gradients
    as they are after all of that is divided out, and before they are clipped. The logged losses are without it.

    The strength grows linearly from `begin` to `full` and stays so until `end`. There, what is not above `threshold`
    is masked, gates stay what they have settled to, and the penalty is over; what is left of the run trains at the
    fixed mask. Logged are `train/penalty` and `sparsity`, the share that is not above the threshold, of weights, groups
    or units.

    Args:
        sparsity: What becomes zero, and by which penalty: `L1`, `GroupLasso` or `HardConcrete`.
        strength: Of the penalty, in nats per target token for a unit of it.
        threshold: Weights of at most this magnitude become zero; groups whose root mean square, and gates whose value
            (between 0 and 1) is not above it.
        begin: When the penalty begins: a step, or a share of the run such as 0.1.
        full: When it has its full strength, likewise.
        end: When it ends.
        leave_out: Regular expressions of names of layers that are no part of it.

    Raises:
        ValueError: Strength or threshold are negative.
    """

    def __init__(
        self,
        sparsity: Sparsity,
        strength: float,
        threshold: float = 1e-3,
        begin: Moment = 0,
        full: Moment = 0.2,
        end: Moment = 0.8,
        leave_out: list[str] | None = None,
    ) -> None:
        for name, value in (("strength", strength), ("threshold", threshold)):
            if not value >= 0:
                raise ValueError(f"{name} is {value}: give a number of at least 0")
        self.sparsity = sparsity
        self.strength = strength
        self.threshold = threshold
        self.begin = begin
        self.full = full
        self.end = end
        self.leave_out = leave_out or []
        self._sparsifier: Sparsifier | None = None
        self._steps = (0, 0, 0)
        self._is_over = False
        self._own_rate: OwnLearningRate | None = None

    @override
    def transformation(self) -> Transformation:
        return Sparsifying(type(self).__name__, self.sparsity, self.leave_out)

    @override
    def setup(self, trainer: Trainer, pl_module: LanguageModule, stage: str) -> None:  # type: ignore[override]
        super().setup(trainer, pl_module, stage)
        if stage == "fit" and self.sparsity.own_learning_rate is not None:
            self._own_rate = OwnLearningRate(pl_module, self.sparsity.own_parameters, self.sparsity.own_learning_rate)

    @override
    def teardown(self, trainer: Trainer, pl_module: LanguageModule, stage: str) -> None:  # type: ignore[override]
        if self._own_rate is not None:
            self._own_rate.undo()
            self._own_rate = None

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LanguageModule) -> None:  # type: ignore[override]
        num_steps = total_steps(trainer, steps_before=0, epochs_before=0)
        begin, full, end = (step_of(getattr(self, name), num_steps, name) for name in ("begin", "full", "end"))
        if not begin <= full <= end or begin == end:
            raise ValueError(f"begin, full and end are the steps {begin}, {full} and {end}: give them in this order")
        self._steps = begin, full, end
        self._sparsifier = self.sparsity.sparsifier(pl_module.built_network, self.leave_out)
        for other in trainer.callbacks:  # type: ignore[attr-defined]
            twice = self._sparsifier.masked & set(other.pruned_layers) if isinstance(other, Pruning) else None
            if twice:
                raise ValueError(
                    f"{type(self).__name__} and {type(other).__name__} both mask {sorted(twice)[0]}: let one of them "
                    "leave it out"
                )

    @override
    def on_before_optimizer_step(  # type: ignore[override]
        self, trainer: Trainer, pl_module: LanguageModule, optimizer: Optimizer
    ) -> None:
        step = trainer.global_step
        if self._is_over:
            for layer in effective_layers(pl_module.built_network).values():
                layer.hold_gradient()
        elif step >= self._steps[0]:
            assert self._sparsifier is not None
            penalty = self._sparsifier.add_gradient(self._strength_at(step))
            every: int = trainer.log_every_n_steps  # type: ignore[attr-defined]
            if every and (step + 1) % every == 0:
                self._report(trainer, {"train/penalty": float(penalty)})

    @override
    def on_train_batch_end(  # type: ignore[override]
        self, trainer: Trainer, pl_module: LanguageModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if at_optimizer_step(trainer):
            if self._is_over:
                for layer in effective_layers(pl_module.built_network).values():
                    layer.hold_weight()
            self._end_if_due(trainer, pl_module)

    @override
    def on_train_batch_start(  # type: ignore[override]
        self, trainer: Trainer, pl_module: LanguageModule, batch: Any, batch_idx: int
    ) -> None:
        self._end_if_due(trainer, pl_module)  # resumed from a checkpoint that another callback made just before

    @override
    def state_dict(self) -> dict[str, Any]:
        return {"is_over": self._is_over}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._is_over = state_dict["is_over"]

    def _strength_at(self, step: int) -> float:
        begin, full, _ = self._steps
        return self.strength * (1.0 if step >= full else (step + 1 - begin) / (full - begin))

    def _end_if_due(self, trainer: Trainer, pl_module: LanguageModule) -> None:
        if self._is_over or trainer.global_step < self._steps[2]:
            return
        assert self._sparsifier is not None
        self._sparsifier.zero(self.threshold)
        self._is_over = True
        zero, count = self._report(trainer, {})
        rank_zero_info(f"step {trainer.global_step}: {zero} of {count} ({zero / count:.1%}) are zero from here on")
        self.announce(pl_module)

    def _report(self, trainer: Trainer, metrics: dict[str, float]) -> Share:
        # Not by `log`, which goes on to say the last value of an epoch once there are no more.
        assert self._sparsifier is not None
        share = self._sparsifier.share(self.threshold)
        for logger in trainer.loggers:
            logger.log_metrics({**metrics, "sparsity": share.num_zero / share.num_all}, logged_step(trainer))
        return share
