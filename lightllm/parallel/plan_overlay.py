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
    chosen = strategy(layout)
    gathers_narrow = layout.shard > 1 and job.autocast is not None and machine.kind == "cuda" and job.low_bit is None
    if gathers_narrow and isinstance(chosen, dict):
        # Weights are gathered in the narrow type, and there is nothing to cast: not also autocast.
        narrow = str(job.autocast).removeprefix("torch.")
        chosen["init_args"]["sharding"] = {"parameter_dtype": narrow, "reduce_dtype": "float32"}
    trainer: dict[str, Any] = {
        "accelerator": "cpu" if machine.kind == "cpu" else "gpu",
        "devices": machine.devices,
        "num_nodes": machine.nodes,
        "strategy": chosen,
        "accumulate_grad_batches": layout.microbatches // in_step,
    }
    if gathers_narrow:
        trainer["precision"] = "32-true"
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
    if degrees.pipeline == 1:
        spread = {"replicate": degrees.replicate, "shard": layout.shard, "tensor": degrees.tensor}
        return {"class_path": "lightllm.parallel.ParallelStrategy", "init_args": spread}
    pipeline = {"pipeline": degrees.pipeline, "microbatches": layout.microbatches, "schedule": layout.schedule}
    within = {"shard": layout.shard, "tensor": degrees.tensor}
    others = {name: degree for name, degree in within.items() if degree > 1}
    return {"class_path": "lightllm.parallel.PipelineParallelStrategy", "init_args": {**pipeline, **others}}
