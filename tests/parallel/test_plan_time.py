"""Seconds of a step, on machines whose numbers are round."""

from __future__ import annotations

import pytest

from lightllm.parallel.block_profile import BlockProfile, NetworkProfile
from lightllm.parallel.degrees import Degrees
from lightllm.parallel.machine import Machine
from lightllm.parallel.network_parts import NetworkParts, Weights
from lightllm.parallel.operation_meter import Operation
from lightllm.parallel.plan_layout import Layout
from lightllm.parallel.plan_memory import OptimizerCost, ranks
from lightllm.parallel.plan_time import StepTime, TimeModel

BLOCK = Weights(4e9, 1e9, 4e9, 4e9, 1e9, 4e9, 1e9)
PARTS = NetworkParts((BLOCK,) * 4, Weights(), Weights(), Weights(), False, 0, (4,))
MACHINE = Machine(
    devices=8,
    teraflops={"float32": 1.0},
    memory_bandwidth=1000.0,
    link=100.0,
    network=10.0,
    link_latency=0.0,
    network_latency=0.0,
    start=0.0,
    efficiency=1.0,
    reach=1.0,
)
PROFILE = NetworkProfile(
    BlockProfile(10**9, 0, True, 0, 0, (Operation(1e12, 0),), (Operation(2e12, 0),)), 0, (Operation(0, 0),)
)


def model(machine: Machine = MACHINE, compiled: bool = False) -> TimeModel:
    return TimeModel(machine, PARTS, OptimizerCost(0.0, 0.0), "float32", is_compiled=compiled)


def step(layout: Layout, machine: Machine = MACHINE) -> StepTime:
    return model(machine).estimate(layout, ranks(layout, 4), PROFILE, 0.0)


def layout(degrees: Degrees, microbatches: int = 1, recompute: bool = False, schedule: str | None = None) -> Layout:
    return Layout(degrees, 1, microbatches, recompute, schedule)


def test_an_operation_takes_its_products_or_its_bytes() -> None:
    operations = [Operation(1e12, 1e9), Operation(1e9, 1e12), Operation(0, 1e12)]
    assert model().device_seconds(operations) == pytest.approx(1 + 1 + 1)
    assert model(compiled=True).device_seconds(operations) == pytest.approx(1 + 1 + 0.5)


def test_a_processor_starts_operations_one_after_another_and_a_gpu_beside_them() -> None:
    slow = {"start": 1e6}
    operations = [Operation(1e12, 0)] * 3
    cpu = Machine(teraflops={"float32": 1.0}, efficiency=1.0, kind="cpu", **slow)  # type: ignore[arg-type]
    gpu = Machine(teraflops={"float32": 1.0}, efficiency=1.0, **slow)  # type: ignore[arg-type]
    assert model(cpu).device_seconds(operations) == pytest.approx(6)
    assert model(gpu).device_seconds(operations) == pytest.approx(3)


def test_one_device_computes_and_recomputes() -> None:
    assert step(layout(Degrees(1, 1, 1, 1), microbatches=2)).compute == pytest.approx(2 * 4 * 3)
    assert step(layout(Degrees(1, 1, 1, 1), recompute=True)).recompute == pytest.approx(4)


@pytest.mark.parametrize(("schedule", "chunks"), [("1f1b", 1), ("interleaved_1f1b", 2)])
def test_a_pipelines_bubble_is_by_the_formula(schedule: str, chunks: int) -> None:
    found = step(layout(Degrees(1, 1, 1, 2), microbatches=4, schedule=schedule))
    of_work = found.bubble / (found.seconds - found.bubble - found.optimizer)
    assert of_work == pytest.approx((2 - 1) / chunks / 4)


def test_tensor_ranks_sum_hidden_states_four_times_a_block() -> None:
    found = step(layout(Degrees(1, 1, 4, 1)))
    assert found.exposed == pytest.approx(4 * 4 * 2 * 0.75 * 1e9 / 100e9)


def test_shards_are_gathered_beside_the_computing_on_a_gpu_only() -> None:
    found = step(layout(Degrees(1, 8, 1, 1)))
    gather = 7 / 8 * 4e9 / 100e9
    assert found.exposed == pytest.approx(gather)  # the first one
    cpu = Machine(**{**vars(MACHINE), "kind": "cpu"})
    assert step(layout(Degrees(1, 8, 1, 1)), cpu).exposed == pytest.approx(4 * 3 * gather)


def test_copies_sum_their_gradients_beside_the_backward_pass() -> None:
    found = step(layout(Degrees(8, 1, 1, 1)))
    assert 0 < found.exposed < 2 * 7 / 8 * 16e9 / 100e9
