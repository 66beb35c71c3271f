"""Throughput: how fast a run is, and where its time goes."""

from __future__ import annotations

import sys
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.strategies import ParallelStrategy
from torch import Tensor, nn
from transformers import PreTrainedModel
from typing_extensions import override

from lightllm.batch import IGNORE_INDEX, PADDING_DOCUMENT, TextBatch
from lightllm.flops import StepFlops, attention_width, peak_flops, step_flops
from lightllm.models.anatomy import output_head, output_layer, unwrapped

if TYPE_CHECKING:
    from lightllm.modules.base import LanguageModule


class Throughput(Callback):
    """Logs speed, use of the device, padding and memory over the last `every_n_steps` optimizer steps.

    - `throughput/tokens_per_second`: tokens without padding, of all ranks; `throughput/target_tokens_per_second`: those
      of them that the loss counts.
    - `throughput/padding_share`: of all positions.
    - `throughput/mfu`: model FLOPs (see `lightllm.flops.step_flops`; attention counts each token's predecessors in its
      document) over what the devices could do in the time. Work beside the network that trains (a reference model, a
      teacher) is not counted.
    - `throughput/step_seconds` = `throughput/data_seconds` (between batches: waiting for the next one, logging) +
      `throughput/compute_seconds`, per optimizer step. A GPU works on behind the host, so there its backlog counts
      where the host waits for it.
    - `throughput/peak_memory_gib`: the most that a rank has held so far; on a CPU the whole process.

    The first step (compilation, first allocations), validation and saving are left out.

    Args:
        every_n_steps: Length of the window in optimizer steps; the trainer's `log_every_n_steps` when None.
        peak_flops: What one device could do, in FLOP/s. When None, it is looked up for known GPUs and measured with a
            matrix product, 0.3 s once, for others.
    """

    def __init__(self, every_n_steps: int | None = None, peak_flops: float | None = None) -> None:
        if every_n_steps is not None and every_n_steps < 1:
            raise ValueError(f"every_n_steps is at least 1, not {every_n_steps}")
        self.every_n_steps = every_n_steps
        self.peak_flops = peak_flops
        self._window: _Window | None = None  # None until the first optimizer step is over
        self._steps_done = 0
        self._batch_began = 0.0
        self._batch_ended: float | None = None  # None after an interruption

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._window = None
        self._steps_done = trainer.global_step
        self._batch_ended = None

    @override
    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        self._batch_began = time.perf_counter()
        if self._window is not None and self._batch_ended is not None:
            self._window.data_seconds += self._batch_began - self._batch_ended

    @override
    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._batch_ended = None

    @override
    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        self._batch_ended = None

    @override
    def on_train_batch_end(  # type: ignore[override]
        self, trainer: Trainer, pl_module: LanguageModule, outputs: Any, batch: TextBatch, batch_idx: int
    ) -> None:
        stepped = trainer.global_step > self._steps_done
        self._steps_done = trainer.global_step
        if self._window is None:
            if stepped:
                _wait_for_device(pl_module.device)
                self._window = _Window()
                self._batch_ended = time.perf_counter()
            return
        self._window.counts = self._window.counts + batch_counts(batch)
        self._window.steps += stepped
        every = self.every_n_steps or trainer.log_every_n_steps  # type: ignore[attr-defined]
        due = stepped and every > 0 and self._steps_done % every == 0
        if due:
            _wait_for_device(pl_module.device)
        self._batch_ended = time.perf_counter()
        self._window.compute_seconds += self._batch_ended - self._batch_began
        if due:
            self._log(self._window, trainer, pl_module)
            self._window = _Window()

    def _log(self, window: _Window, trainer: Trainer, pl_module: LanguageModule) -> None:
        if self.peak_flops is None:
            self.peak_flops = peak_flops(pl_module.device, _compute_dtype(trainer, pl_module.built_network))
            self._batch_ended = None  # measuring is no waiting for data
        counts = trainer.strategy.reduce(window.counts, reduce_op="sum")
        peak = torch.tensor(peak_memory(pl_module.device), device=pl_module.device)
        memory = trainer.strategy.reduce(peak, reduce_op="max")
        assert isinstance(counts, Tensor)
        assert isinstance(memory, Tensor)
        # Ranks that share their data (tensor and pipeline parallel) have counted the same tokens.
        share = _data_ranks(trainer) / trainer.world_size
        positions, tokens, targets, pairs = (share * count for count in counts.tolist())
        seconds = window.data_seconds + window.compute_seconds
        possible = seconds * self.peak_flops * trainer.world_size
        pl_module.log("throughput/tokens_per_second", tokens / seconds, prog_bar=True)
        pl_module.log_dict(
            {
                "throughput/target_tokens_per_second": targets / seconds,
                "throughput/padding_share": 1 - tokens / positions,
                "throughput/mfu": _step_flops(pl_module.built_network).total(tokens, targets, pairs) / possible,
                "throughput/step_seconds": seconds / window.steps,
                "throughput/data_seconds": window.data_seconds / window.steps,
                "throughput/compute_seconds": window.compute_seconds / window.steps,
                "throughput/peak_memory_gib": memory / 2**30,
            }
        )


@dataclass
class _Window:
    """What is added up between two logs."""

    steps: int = 0
    data_seconds: float = 0.0
    compute_seconds: float = 0.0
    counts: Tensor | int = 0
    """As `batch_counts` returns them; they stay on the device, so that counting waits for nothing."""


def batch_counts(batch: TextBatch) -> Tensor:
    """Count a batch: positions, tokens (without padding), targets, and pairs of a token and one that it sees.

    Returns:
        int64 `[4]` on the batch's device.
    """
    real = batch["document_ids"] != PADDING_DOCUMENT
    targets = batch["labels"] != IGNORE_INDEX
    pairs = (batch["position_ids"] + 1) * real
    return torch.stack([torch.ones_like(real).sum(), real.sum(), targets.sum(), pairs.sum()])


def peak_memory(device: torch.device) -> float:
    """Return the most bytes held so far: a GPU's tensors, or on a CPU the whole process (0 on Windows)."""
    if device.type == "cuda":
        return float(torch.cuda.max_memory_allocated(device))
    if sys.platform == "win32":
        return 0.0
    import resource  # not on Windows

    unit = 1 if sys.platform == "darwin" else 1024
    return float(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit)


def _wait_for_device(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _step_flops(network: nn.Module) -> StepFlops:
    base = unwrapped(network)
    width = attention_width(base.config) if isinstance(base, PreTrainedModel) else 0
    # A network that ends in hidden states has a head of no weights.
    head = torch.zeros(0, 0) if output_layer(network) is None else output_head(network).weight
    return step_flops(network, head, width)


def _compute_dtype(trainer: Trainer, network: nn.Module) -> torch.dtype:
    """The type that products are formed in: mixed precision's, else that of the network's first weights."""
    mixed = {"bf16-mixed": torch.bfloat16, "16-mixed": torch.float16}.get(str(trainer.precision))
    return mixed or next(p.dtype for p in network.parameters() if p.is_floating_point())


def _data_ranks(trainer: Trainer) -> int:
    """How many ranks see different data."""
    if not isinstance(trainer.strategy, ParallelStrategy):
        return 1
    return int((trainer.strategy.distributed_sampler_kwargs or {}).get("num_replicas", trainer.world_size))
