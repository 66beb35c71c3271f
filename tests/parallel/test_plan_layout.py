"""Which layouts are considered."""

from __future__ import annotations

import math

from lightllm.parallel.degrees import Degrees
from lightllm.parallel.machine import machine
from lightllm.parallel.network_parts import NetworkParts, Weights
from lightllm.parallel.plan_layout import Layout, layouts

BLOCK = Weights(100, 25, 100, 100, 25, 100, 25)


def parts(num_blocks: int = 8, dividends: tuple[int, ...] = (8, 4, 48)) -> NetworkParts:
    return NetworkParts((BLOCK,) * num_blocks, BLOCK, BLOCK, Weights(), False, 0, dividends)


def test_every_layout_uses_all_devices_and_all_rows() -> None:
    found = list(layouts(parts(), machine("h100-8x2"), 64))
    assert found
    for one in found:
        assert math.prod(one.degrees.sizes) == 16
        assert one.rows * one.microbatches * one.degrees.num_data_ranks == 64
    assert len(found) == len(set(found))


def test_tensor_groups_stay_in_a_node_and_divide_heads_and_neurons() -> None:
    degrees = {one.degrees.tensor for one in layouts(parts(), machine("h100-8x2"), 64)}
    assert degrees == {1, 2, 4}
    assert {one.degrees.tensor for one in layouts(parts(dividends=()), machine("h100-8x2"), 64)} == {1}


def test_a_pipeline_has_a_block_a_stage_and_as_many_microbatches_as_stages() -> None:
    found = [one for one in layouts(parts(num_blocks=4), machine("h100-8"), 16) if one.degrees.pipeline > 1]
    assert {one.degrees.pipeline for one in found} == {2, 4}
    assert all(one.microbatches >= one.degrees.pipeline for one in found)
    interleaved = [one for one in found if one.schedule == "interleaved_1f1b"]
    assert {one.degrees.pipeline for one in interleaved} == {2}


def test_a_copy_of_the_weights_takes_one_device_a_node_or_all() -> None:
    found = {one.shard for one in layouts(parts(), machine("h100-8x4"), 32) if one.degrees.tensor == 1}
    assert found >= {1, 8, 32}


def test_rows_are_powers_of_two_or_all() -> None:
    assert {one.rows for one in layouts(parts(), machine("h100-1"), 12)} == {1, 2, 4, 12}


def test_a_layout_is_described_by_what_is_not_one() -> None:
    assert Layout(Degrees(1, 1, 1, 1), 1, 1, False).describe() == "one device"
    assert Layout(Degrees(2, 4, 1, 2), 1, 2, False, "1f1b").describe() == "replicate 2 x shard 4 x pipeline 2 (1f1b)"
