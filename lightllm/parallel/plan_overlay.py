"""The plan as a configuration: what is added to that of the run."""

from __future__ import annotations

from typing import Any

from lightllm.parallel.machine import Machine
from lightllm.parallel.plan import Job
from lightllm.parallel.plan_layout import Layout


def overlay(layout: Layout, machine: Machine, job: Job) -> dict[str, Any]:
    """The fields that make a run this layout.

    Args:
        layout: How it is spread.
        machine: On what.
        job: What is trained.
    """
    in_step = layout.microbatches if layout.degrees.pipeline > 1 else 1
    trainer: dict[str, Any] = {
        "accelerator": "cpu" if machine.kind == "cpu" else "gpu",
        "devices": machine.devices,
        "num_nodes": machine.nodes,
        "strategy": strategy(layout),
        "accumulate_grad_batches": layout.microbatches // in_step,
    }
    return {
        "trainer": trainer,
        "model": {"init_args": {"gradient_checkpointing": layout.recompute}},
        "data": {"init_args": {"batches": {"tokens": layout.rows * in_step * job.length, "documents": None}}},
    }


def strategy(layout: Layout) -> str | dict[str, Any]:
    """The trainer's `strategy`."""
    degrees = layout.degrees
    if degrees.pipeline == degrees.tensor == layout.shard == 1:
        return "auto" if degrees.replicate == 1 else "ddp"
    spread: dict[str, Any] = {"replicate": degrees.replicate, "shard": layout.shard, "tensor": degrees.tensor}
    if degrees.pipeline == 1:
        return {"class_path": "lightllm.parallel.ParallelStrategy", "init_args": spread}
    pipeline = {"pipeline": degrees.pipeline, "schedule": layout.schedule, "microbatches": layout.microbatches}
    return {"class_path": "lightllm.parallel.PipelineParallelStrategy", "init_args": {**pipeline, **spread}}
