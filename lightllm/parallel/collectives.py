"""How long exchanges between devices take: bytes over the slowest link, and a latency for each neighbour."""

from __future__ import annotations

from typing import NamedTuple

from lightllm.parallel.machine import Machine


class Group(NamedTuple):
    """Ranks that exchange something, at equal distances."""

    size: int
    stride: int
    """From one rank of the group to the next; axes within come first in the machine."""

    def of_one_node(self, machine: Machine) -> int:
        """How many of them are in one node."""
        return max(1, min(self.size, machine.devices // self.stride))


def all_gather_seconds(machine: Machine, group: Group, size: float) -> float:
    """How long until every rank has all of `size` bytes, of which each begins with its share.

    A reduce-scatter is the same the other way round, and an all-reduce one after the other.
    """
    if group.size == 1 or size == 0:
        return 0.0
    local = group.of_one_node(machine)
    nodes = -(-group.size // local)
    # Every rank of a node has a way out of its own, so a ring through nodes goes as many ways at once.
    bandwidth = machine.link if nodes == 1 else min(machine.link, machine.network * local)
    latency = (local - 1) * machine.link_latency + (nodes - 1) * machine.network_latency
    return size * (group.size - 1) / group.size / (bandwidth * 1e9 * machine.reach) + latency * 1e-6


def all_reduce_seconds(machine: Machine, group: Group, size: float) -> float:
    """How long until every rank has the sum of `size` bytes."""
    return 2 * all_gather_seconds(machine, group, size)


def send_seconds(machine: Machine, stride: int, size: float) -> float:
    """How long `size` bytes take to the rank that is `stride` further."""
    within = stride < machine.devices
    bandwidth = machine.link if within else machine.network
    latency = machine.link_latency if within else machine.network_latency
    return size / (bandwidth * 1e9 * machine.reach) + latency * 1e-6
