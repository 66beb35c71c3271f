"""Exchanges against the ring's own arithmetic."""

from __future__ import annotations

import pytest

from lightllm.parallel.collectives import Group, all_gather_seconds, all_reduce_seconds, send_seconds
from lightllm.parallel.machine import Machine

MACHINE = Machine(devices=8, nodes=4, link=100.0, network=10.0, link_latency=0, network_latency=0, reach=1.0)


def test_within_a_node_each_rank_receives_all_but_its_share() -> None:
    assert all_gather_seconds(MACHINE, Group(4, 1), 8e9) == pytest.approx(6e9 / 100e9)
    assert all_reduce_seconds(MACHINE, Group(4, 1), 8e9) == pytest.approx(12e9 / 100e9)


def test_a_group_of_whole_nodes_has_all_their_ways_out() -> None:
    assert all_gather_seconds(MACHINE, Group(16, 1), 16e9) == pytest.approx(15e9 / 80e9)


def test_a_group_of_one_rank_a_node_has_one() -> None:
    assert Group(4, 8).of_one_node(MACHINE) == 1
    assert all_gather_seconds(MACHINE, Group(4, 8), 4e9) == pytest.approx(3e9 / 10e9)


def test_nothing_takes_no_time() -> None:
    assert all_gather_seconds(MACHINE, Group(1, 1), 1e9) == 0.0
    assert all_gather_seconds(MACHINE, Group(8, 1), 0) == 0.0


def test_many_neighbours_take_time_however_little_is_sent() -> None:
    slow = Machine(devices=8, nodes=4, link_latency=1.0, network_latency=10.0)
    assert all_gather_seconds(slow, Group(32, 1), 1) == pytest.approx(37e-6, rel=0.01)


def test_a_message_to_another_node_goes_by_the_network() -> None:
    assert send_seconds(MACHINE, 4, 1e9) == pytest.approx(0.01)
    assert send_seconds(MACHINE, 8, 1e9) == pytest.approx(0.1)
