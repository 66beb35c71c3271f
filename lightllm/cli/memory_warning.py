"""What `fit` says before it loads anything, where the planner finds that a run will not fit its devices."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import replace
from typing import Literal

import torch
from lightning.pytorch import LightningDataModule, Trainer
from lightning.pytorch.accelerators import CPUAccelerator, CUDAAccelerator
from lightning.pytorch.strategies import DDPStrategy, DeepSpeedStrategy, SingleDeviceStrategy, Strategy
from lightning.pytorch.utilities.rank_zero import rank_zero_info

from lightllm.cli.planning import job_of, rows_of, vocabulary_of
from lightllm.datamodules import DocumentData
from lightllm.models.inference import own_random_numbers
from lightllm.modules import LanguageModule
from lightllm.parallel import ParallelStrategy, PipelineParallelStrategy
from lightllm.parallel.degrees import Degrees
from lightllm.parallel.machine import GIB, Machine
from lightllm.parallel.machine_here import device_memory
from lightllm.parallel.plan import Planner
from lightllm.parallel.plan_layout import Layout


def warn_of_memory(module: LanguageModule, data: LightningDataModule, trainer: Trainer) -> None:
    """Say that a run will not fit, if that can be known before its network is built.

    Nothing is said of what the planner doesn't know: another accelerator, other data, another way to spread a run.
    """
    if not isinstance(trainer.accelerator, (CPUAccelerator, CUDAAccelerator)) or not isinstance(data, DocumentData):
        return
    if not is_planned(trainer.strategy):
        return
    # An estimate ends no run that may be right: whatever goes wrong here is said when the network is built, or is a
    # fault of the estimate alone.
    with suppress(Exception), own_random_numbers(torch.device("cpu"), seed=0):  # the run's are drawn after this
        kind = _kind_of(trainer)
        memory = device_memory(kind) / (trainer.num_devices if kind == "cpu" else 1)
        told = memory_warning(module, data, trainer, memory)
        if told is not None:
            rank_zero_info(told)


def is_planned(strategy: Strategy) -> bool:
    """Whether the planner knows how a strategy spreads a run; of Lightning's FSDP and DeepSpeed it doesn't."""
    known = (SingleDeviceStrategy, DDPStrategy, ParallelStrategy, PipelineParallelStrategy)
    return isinstance(strategy, known) and not isinstance(strategy, DeepSpeedStrategy)  # which Lightning calls a DDP


def memory_warning(module: LanguageModule, data: DocumentData, trainer: Trainer, memory: float) -> str | None:
    """What there is to say of a run whose devices have so many bytes each; None if it fits.

    Raises:
        ValueError: The network cannot be looked at without being built.
    """
    kind = _kind_of(trainer)
    machine = Machine(devices=trainer.num_devices, nodes=trainer.num_nodes, memory=memory / GIB, kind=kind, reserve=0.0)
    job = job_of(module, data.max_length, None, str(trainer.precision), machine, vocabulary_of(module, data))
    if isinstance(trainer.strategy, ParallelStrategy) and trainer.strategy.spread.sharding.parameter_dtype is None:
        machine = replace(machine, kind="cpu")  # weights are gathered in their own type
    layout = layout_of(trainer, rows_of(data), module.plan.gradient_checkpointing)
    found = Planner(job, machine).estimate(layout)
    if found.fits:
        return None
    parts = {name: getattr(found.memory, name) / GIB for name in ("weights", "optimizer", "gradients", "activations")}
    told = ", ".join(f"{name} {size:.3g}" for name, size in parts.items())
    return (
        f"warning: full batches will need about {found.memory.peak / GIB:.3g} GiB of the {memory / GIB:.3g} GiB that a "
        f"device has ({told}): `lightllm plan` with the same arguments and --here shows what fits"
    )


def _kind_of(trainer: Trainer) -> Literal["cpu", "cuda"]:
    return "cpu" if isinstance(trainer.accelerator, CPUAccelerator) else "cuda"


def layout_of(trainer: Trainer, rows: int, recompute: bool) -> Layout:
    """How a trainer spreads batches of so many rows."""
    strategy, accumulate = trainer.strategy, trainer.accumulate_grad_batches
    if isinstance(strategy, PipelineParallelStrategy):
        plan, degrees = strategy.plan, strategy.degrees
        shard = 1 if degrees.shard == "auto" else degrees.shard
        copies = trainer.world_size // plan.num_ranks // degrees.tensor // shard
        degrees = Degrees(copies, shard, degrees.tensor, plan.num_ranks)
        size = -(-rows // plan.microbatches)
        return Layout(degrees, size, plan.microbatches * accumulate, recompute, plan.name)
    if isinstance(strategy, ParallelStrategy):
        return Layout(strategy.degrees.resolved(trainer.world_size), rows, accumulate, recompute)
    return Layout(Degrees(trainer.world_size, 1, 1, 1), rows, accumulate, recompute)
