"""The module under every objective: how a network is built, trained and measured."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, ClassVar, NamedTuple

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.cli import OptimizerCallable
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.types import OptimizerLRSchedulerConfig
from torch import Tensor, nn
from torch.optim import Optimizer
from torchmetrics import Metric
from transformers import PreTrainedTokenizerBase
from typing_extensions import override

from lightllm.batch import IGNORE_INDEX, TextBatch
from lightllm.losses import linear_log_probabilities, linear_token_statistics
from lightllm.models.adapters import Adapter, Full
from lightllm.models.anatomy import output_head, vocabulary_size
from lightllm.models.hidden_states import hidden_states
from lightllm.models.load import load_tokenizer
from lightllm.models.network import BuildRequest, Network, Task
from lightllm.models.token_bytes import bytes_per_token
from lightllm.models.transformation import Announcements, Record, Transformation
from lightllm.modules.agreement import check_agreement, check_composition
from lightllm.modules.build import BuildPlan, build_network
from lightllm.modules.checkpointing import check_restored, without_restorable_weights
from lightllm.modules.heap import keep_freed_memory
from lightllm.modules.parameter_groups import adamw, parameter_groups
from lightllm.modules.run_length import total_optimizer_steps
from lightllm.modules.scale_in_place import scale_in_place
from lightllm.modules.schedule import Schedule
from lightllm.modules.token_metrics import TokenMetrics, sum_dtype
from lightllm.parallel.data_ranks import num_data_ranks, sum_over_data_ranks
from lightllm.parallel.spreading import SpreadsWeights

_LOSS_UNIT = 4096
"""Summed losses are divided by this before backward, so that half-precision gradients stay in range; a power of two,
so that dividing by it and multiplying the gradients back changes no bit."""


class Loss(NamedTuple):
    """A loss as a sum, so that however a batch is cut, the parts add up."""

    sum: Tensor
    """Over everything that counts; a scalar."""
    weight: Tensor
    """How much counts: the number of target tokens, or of pairs; a scalar."""


class LanguageModule(LightningModule, ABC):
    """A network, an objective and how it is optimised.

    A leaf gives `criterion`; the rest is here. The loss that is optimised is the sum over an optimizer step's
    micro-batches and ranks divided by the sum of their weights, so gradients do not depend on how the step was cut.

    Args:
        network: Where the network comes from.
        adapter: What of it trains, and what is added.
        optimizer: Any torch optimizer by class path (`bitsandbytes.optim.AdamW8bit`, …), AdamW when None.
        schedule: The learning rate over the run.
        gradient_checkpointing: Recompute each block's activations in the backward pass: slower, in less memory.
        compile: `torch.compile` each block.

    Raises:
        ValueError: The adapter does not work with gradient checkpointing.
    """

    task: ClassVar[Task] = "causal"

    def __init__(
        self,
        network: Network,
        adapter: Adapter | None = None,
        optimizer: OptimizerCallable | None = None,
        schedule: Schedule | None = None,
        gradient_checkpointing: bool = False,
        compile: bool = False,
    ) -> None:
        super().__init__()
        adapter = adapter or Full()
        if gradient_checkpointing and not adapter.supports_gradient_checkpointing:
            raise ValueError(f"{type(adapter).__name__} does not work with gradient_checkpointing: leave it off")
        self.plan = BuildPlan(network, adapter, self.task, gradient_checkpointing, compile)
        self.optimizer: OptimizerCallable = optimizer or adamw
        self.schedule = schedule or Schedule()
        self.transformations: dict[str, Transformation] = {}
        self.records: dict[str, Record] = {}
        """What the transformations did, by their names: read from a checkpoint before the network is built again."""
        self.announcements = Announcements()
        self._repeated: set[str] = set()
        self.tokenizer: PreTrainedTokenizerBase | None = None
        self.network: nn.Module | None = None
        self.metrics = self.new_metrics()
        self.strict_loading = False  # frozen pretrained weights are in no checkpoint; `on_load_checkpoint` is strict
        self._step = torch.zeros(2, dtype=sum_dtype())

    @property
    def tokenizer_source(self) -> str | None:
        """Where a datamodule that names no tokenizer finds the network's own."""
        return self.plan.network.tokenizer_source

    @property
    def built_network(self) -> nn.Module:
        """The network, once `configure_model` has run.

        Raises:
            RuntimeError: It has not.
        """
        if self.network is None:
            raise RuntimeError("the network is not built yet: it is from configure_model on")
        return self.network

    def register_transformation(self, transformation: Transformation) -> None:
        """Have the build pipeline change the network; to be called from a callback's `setup`, before the module's."""
        self.transformations[transformation.name] = transformation

    @abstractmethod
    def criterion(self, hidden: Tensor, batch: TextBatch) -> Loss:
        """The loss of a batch whose hidden states are `[batch, seq, hidden]`, as a sum and a weight."""

    @override
    def forward(self, batch: TextBatch) -> Tensor:
        """Hidden states before the head, `[batch, seq, hidden]`."""
        return hidden_states(self.built_network, batch)

    @override
    def setup(self, stage: str) -> None:
        datamodule = getattr(self.trainer, "datamodule", None)
        self.tokenizer = getattr(datamodule, "tokenizer", None)
        if self.tokenizer is None and self.tokenizer_source is not None:
            self.tokenizer = load_tokenizer(self.tokenizer_source)
        transformations = list(self.transformations.values())
        check_composition(self.plan.adapter, transformations, self._rows_are_packed(), self.trainer.strategy)

    @override
    def configure_model(self) -> None:
        if self.network is not None:
            return
        request = BuildRequest(self.task, self.tokenizer, self.plan.adapter.quantization)
        self._repeated = set(self.records)
        self.network = build_network(self.plan, request, self._due_transformations(), self.records, self.announcements)
        length = getattr(getattr(self._trainer, "datamodule", None), "max_length", None)
        packed = self._rows_are_packed() and self.task == "causal"  # the others are told of documents by a mask
        check_agreement(self.network, self.tokenizer, length, packed)

    def _due_transformations(self) -> list[Transformation]:
        """All when a run begins or is read back; a network that is measured as it comes has lost no part yet."""
        begins = self._trainer is None or self.trainer.state.fn == TrainerFn.FITTING
        known, ours = self.records, self.transformations.values()
        return [one for one in ours if begins or not one.kind.before_adapter or one.name in known]

    def _rows_are_packed(self) -> bool:
        datamodule = getattr(self._trainer, "datamodule", None)
        return getattr(getattr(datamodule, "batches", None), "mode", None) == "packed"

    @override
    def on_fit_start(self) -> None:
        self._step = torch.zeros(2, dtype=sum_dtype(), device=self.device)
        if self.device.type == "cpu":
            keep_freed_memory()

    @override
    def training_step(self, batch: TextBatch, batch_idx: int) -> dict[str, Tensor]:
        return self.training_output(*self.criterion(self(batch), batch))

    def training_output(self, loss_sum: Tensor, weight: Tensor) -> dict[str, Tensor]:
        """Count a batch's loss in its optimizer step, and return what `training_step` does."""
        self._step += torch.stack([loss_sum.detach(), weight.detach()]).to(self._step.dtype)
        if self._batch_is_step():
            scaled = loss_sum / weight.clamp(min=1)
        else:  # Lightning divides by accumulate_grad_batches: undone. `on_after_backward` divides by the weight.
            scaled = loss_sum * (self.trainer.accumulate_grad_batches / _LOSS_UNIT)
        return {"loss": scaled, "loss_sum": loss_sum.detach(), "weight": weight.detach()}

    @override
    def on_after_backward(self) -> None:
        if self.trainer.fit_loop._should_accumulate():
            return
        total = sum_over_data_ranks(self.trainer.strategy, self._step)
        if not self._batch_is_step():
            # Gradients are a mean over data ranks of sums over micro-batches: this makes them a mean over all targets.
            factor = _LOSS_UNIT * num_data_ranks(self.trainer.strategy) / total[1].clamp(min=1)
            scale_in_place([p.grad for p in self.parameters() if p.grad is not None], factor)
        self.log("train/loss", (total[0] / total[1].clamp(min=1)).float(), prog_bar=True)
        self._step = torch.zeros_like(self._step)

    @override
    def configure_gradient_clipping(
        self, optimizer: Optimizer, gradient_clip_val: float | None = None, gradient_clip_algorithm: str | None = None
    ) -> None:
        strategy = self.trainer.strategy
        if isinstance(strategy, SpreadsWeights) and gradient_clip_val and gradient_clip_algorithm != "value":
            strategy.clip_gradients(self.parameters(), gradient_clip_val)
        else:
            super().configure_gradient_clipping(optimizer, gradient_clip_val, gradient_clip_algorithm)

    @override
    def on_train_end(self) -> None:  # after every callback's, which may be the last to change the network
        self.announcements.make("trained", self.built_network)

    def _batch_is_step(self) -> bool:
        """Whether a batch is a whole optimizer step, so that its weight is the step's and is known before backward."""
        return self.trainer.accumulate_grad_batches == 1 and num_data_ranks(self.trainer.strategy) == 1

    @override
    def validation_step(self, batch: TextBatch, batch_idx: int) -> None:
        self.measure(batch)

    @override
    def on_validation_epoch_end(self) -> None:
        self._log_metrics("val")

    @override
    def test_step(self, batch: TextBatch, batch_idx: int) -> None:
        self.measure(batch)

    @override
    def on_test_epoch_end(self) -> None:
        self._log_metrics("test")

    @override
    def predict_step(self, batch: TextBatch, batch_idx: int) -> Tensor:
        """Log probability of every target, `[batch, seq]`, 0 elsewhere; in nats."""
        head = output_head(self.built_network)._asdict()
        return linear_log_probabilities(self(batch), labels=batch["labels"], **head)

    def new_metrics(self) -> Metric:
        """What validation and test measure: a metric whose `compute` gives a dictionary of numbers by name."""
        return TokenMetrics()

    def measure(self, batch: TextBatch) -> None:
        """Add a batch of validation or test to `self.metrics`."""
        self.measure_tokens(self(batch), batch)

    def measure_tokens(self, hidden: Tensor, batch: TextBatch) -> None:
        """Add a batch's token metrics, from its hidden states `[batch, seq, hidden]`."""
        head = output_head(self.built_network)
        statistics = linear_token_statistics(hidden, labels=batch["labels"], **head._asdict())
        targets = batch["labels"][batch["labels"] != IGNORE_INDEX]
        self.metrics.update(*statistics, self._token_bytes()[targets].sum())

    def _token_bytes(self) -> Tensor:
        """UTF-8 bytes per token id, `[vocab]`; zeros where there is no tokenizer."""
        if "_bytes_per_token" not in dict(self.named_buffers(recurse=False)):
            table = bytes_per_token(self.tokenizer, vocabulary_size(self.built_network))
            self.register_buffer("_bytes_per_token", table.to(self.device), persistent=False)
        return self.get_buffer("_bytes_per_token")

    def _log_metrics(self, split: str) -> None:
        values = self.metrics.compute()  # over all ranks, by torchmetrics: their largest is what each of them has
        self.metrics.reset()
        for name, value in values.items():
            self.log(f"{split}/{name}", value, prog_bar=name == "loss", sync_dist=True, reduce_fx="max")

    @override
    def configure_optimizers(self) -> OptimizerLRSchedulerConfig:
        optimizer = self.optimizer(parameter_groups(self))
        if self.trainer.precision == "bf16-mixed":
            # A fused optimizer would unscale gradients, so Lightning refuses to clip them; bfloat16 has no scale.
            optimizer._step_supports_amp_scaling = False  # type: ignore[attr-defined]
        # Lightning's trial of one step is too short for a warm-up of several, and no reason to refuse it.
        schedule = Schedule("constant") if self.trainer.fast_dev_run else self.schedule  # type: ignore[attr-defined]
        scheduler = schedule.scheduler(optimizer, total_optimizer_steps(self.trainer))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    @property
    def _restorable(self) -> bool:
        """Whether the frozen weights of another build would be these."""
        return self.plan.network.restorable and not any(
            one.changes_frozen_weights for one in self.transformations.values()
        )

    @override
    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["transformations"] = self.records
        if self._restorable:
            checkpoint["state_dict"] = without_restorable_weights(self, checkpoint["state_dict"])

    @override
    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self._build_as(checkpoint.get("transformations", {}))
        check_restored(self, checkpoint["state_dict"], frozen_may_miss=self._restorable)

    def _build_as(self, records: dict[str, Record]) -> None:
        """Build the network once more, as the checkpoint's was, unless its records were known when it was built."""
        if self._repeated == set(records):
            return
        if self._trainer is not None and self.trainer.strategy.restore_checkpoint_after_setup:
            raise ValueError(
                f"{type(self.trainer.strategy).__name__} loads a checkpoint when it is too late to change the network: "
                "set module.records to checkpoint_io.read_entry(checkpoint, 'transformations', {}) first, as "
                "lightllm fit --resume does"
            )
        self.network, self.records = None, records
        self.configure_model()
