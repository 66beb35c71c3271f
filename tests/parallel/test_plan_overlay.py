"""The overlay that makes a run the plan's best."""

from __future__ import annotations

from planned_run import CPU, Case

from lightllm.parallel.degrees import Degrees
from lightllm.parallel.machine import machine
from lightllm.parallel.plan_layout import Layout
from lightllm.parallel.plan_overlay import overlay, strategy


def test_copies_alone_are_ddp_and_one_device_needs_nothing() -> None:
    assert strategy(Layout(Degrees(1, 1, 1, 1), 1, 1, False)) == "auto"
    assert strategy(Layout(Degrees(4, 1, 1, 1), 1, 1, False)) == "ddp"


def test_shards_and_tensor_degrees() -> None:
    found = strategy(Layout(Degrees(2, 4, 2, 1), 1, 1, False))
    assert found == {
        "class_path": "lightllm.parallel.ParallelStrategy",
        "init_args": {"replicate": 2, "shard": 4, "tensor": 2},
    }


def test_a_batch_is_a_micro_batch_or_all_of_a_pipelines() -> None:
    job = Case("one", length=128).job()
    plain = overlay(Layout(Degrees(1, 8, 1, 1), 4, 3, True), machine("h100-8"), job)
    assert plain["trainer"]["accumulate_grad_batches"] == 3
    assert plain["data"]["init_args"]["batches"]["tokens"] == 4 * 128
    assert plain["model"]["init_args"]["gradient_checkpointing"] is True
    pipeline = overlay(Layout(Degrees(1, 1, 1, 8), 4, 8, False, "1f1b"), machine("h100-8"), job)
    assert pipeline["trainer"]["accumulate_grad_batches"] == 1
    assert pipeline["data"]["init_args"]["batches"]["tokens"] == 4 * 8 * 128
    assert pipeline["trainer"]["strategy"]["init_args"]["microbatches"] == 8
    assert overlay(Layout(Degrees(1, 1, 1, 1), 1, 1, False), CPU, job)["trainer"]["accelerator"] == "cpu"
