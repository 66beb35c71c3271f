"""The phases of a step, on numbers that can be added by hand."""

from __future__ import annotations

import pytest

from lightllm.parallel.block_profile import BlockProfile, NetworkProfile
from lightllm.parallel.degrees import Degrees
from lightllm.parallel.loss_buffers import LossBuffers
from lightllm.parallel.network_parts import NetworkParts, Weights
from lightllm.parallel.plan_layout import Layout
from lightllm.parallel.plan_memory import MemoryModel, OptimizerCost, ranks

BLOCK = Weights(400, 100, 400, 400, 100, 400, 100)
PARTS = NetworkParts(
    (BLOCK,) * 4, Weights(80, 20, 80, 0, 0, 0, 20), Weights(80, 20, 80, 0, 0, 0, 20), Weights(), False, 0, (4,)
)
LOSS = LossBuffers(forward=500, kept=100, backward=100)
ADAMW = OptimizerCost(state=8.0, scratch=0.0)


def network(kept: int) -> NetworkProfile:
    return NetworkProfile(BlockProfile(10, kept, True, kept, 50, (), ()), 20, ())


def estimate(layout: Layout, kept: int = 1000, optimizer: OptimizerCost = ADAMW, stage: int = 0):  # type: ignore[no-untyped-def]
    return MemoryModel(PARTS, optimizer).estimate(layout, ranks(layout, 4)[stage], network(kept), LOSS)


def one_device(**fields: object) -> Layout:
    return Layout(**{"degrees": Degrees(1, 1, 1, 1), "rows": 1, "microbatches": 1, "recompute": False, **fields})  # type: ignore[arg-type]


def test_activations_are_held_beside_the_gradients_of_the_last_step() -> None:
    found = estimate(one_device())
    assert found.phase == "loss"
    assert found.peak == (4 * 400 + 160) * (1 + 1 + 2) + (4 * 1000 + 20) + 500


def test_an_optimizer_that_takes_much_for_a_moment_is_the_worst_moment() -> None:
    found = estimate(one_device(), kept=1, optimizer=OptimizerCost(8.0, 0.0, scratch_of_all=40.0))
    assert found.phase == "optimizer"
    assert found.working == 40 * 440


def test_recomputation_keeps_the_input_of_each_block_and_one_block_whole() -> None:
    found = estimate(one_device(recompute=True))
    assert found.activations <= 4 * 10 + 20
    assert found.phase != "loss" or found.loss == 500


@pytest.mark.parametrize(("shard", "part"), [(2, 0.5), (4, 0.25)])
def test_shards_share_weights_gradients_and_state(shard: int, part: float) -> None:
    found = estimate(one_device(degrees=Degrees(1, shard, 1, 1)))
    assert found.optimizer == 8 * 440 * part
    assert found.weights == 1760 * part + 160  # what is outside of blocks is gathered all the time


def test_copies_hold_their_gradients_twice() -> None:
    one, two = estimate(one_device()), estimate(one_device(degrees=Degrees(2, 1, 1, 1)))
    assert two.weights - one.weights == 1760


def test_stages_hold_as_many_microbatches_as_come_before_the_first_returns() -> None:
    layout = one_device(degrees=Degrees(1, 1, 1, 2), microbatches=4, schedule="1f1b")
    assert [one.in_flight for one in ranks(layout, 4)] == [2, 1]
    first, last = estimate(layout), estimate(layout, stage=1)
    assert first.optimizer == last.optimizer == 8 * 220
    assert first.activations > last.activations
    assert first.loss <= 10


def test_interleaved_stages_hold_more() -> None:
    plain = one_device(degrees=Degrees(1, 1, 1, 2), microbatches=4, schedule="1f1b")
    interleaved = one_device(degrees=Degrees(1, 1, 1, 2), microbatches=4, schedule="interleaved_1f1b")
    assert ranks(interleaved, 8)[0].in_flight > ranks(plain, 8)[0].in_flight


def test_unequal_stages() -> None:
    layout = one_device(degrees=Degrees(1, 1, 1, 3), microbatches=3, schedule="1f1b")
    assert [one.num_blocks for one in ranks(layout, 4)] == [2, 1, 1]
