"""Machines by name and by file, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from lightllm.flops import known_peak
from lightllm.parallel.machine import KNOWN, Machine, machine


@pytest.mark.parametrize(("name", "world_size"), [("h100-8", 8), ("a100-8x16", 128), ("h100-96-8x2", 16)])
def test_a_name_says_the_device_and_how_many(name: str, world_size: int) -> None:
    assert machine(name).world_size == world_size


@pytest.mark.parametrize(("name", "full_name"), [("h100", "NVIDIA H100 80GB HBM3"), ("a100", "NVIDIA A100-SXM4-80GB")])
def test_peaks_are_those_that_throughput_divides_by(name: str, full_name: str) -> None:
    import torch

    assert KNOWN[name].teraflops["bfloat16"] * 1e12 == known_peak(full_name, torch.bfloat16)


def test_a_file_says_everything_or_begins_from_a_device(tmp_path: Path) -> None:
    whole = tmp_path / "own.yaml"
    whole.write_text("devices: 4\nnodes: 2\nmemory: 24\nteraflops: {bfloat16: 100, float32: 50}\nlink: 16\n")
    found = machine(str(whole))
    assert (found.world_size, found.memory, found.link) == (8, 24, 16)
    assert found.rate("bfloat16") == pytest.approx(0.7e14)
    like = tmp_path / "own.json"
    like.write_text(json.dumps({"like": "a100", "devices": 2, "link": 32}))
    found = machine(str(like))
    assert (found.devices, found.link, found.memory_bandwidth) == (2, 32, 2039.0)


def test_half_precision_is_as_fast_as_the_other_half_and_unknown_types_as_the_slowest() -> None:
    found = Machine(teraflops={"bfloat16": 4.0, "float32": 1.0}, efficiency=1.0)
    assert found.rate("float16") == found.rate("bfloat16") == 4e12
    assert found.rate("float64") == 1e12


@pytest.mark.parametrize(
    ("description", "says"),
    [
        ("h100", r"name a device and how many a node has, such as h100-8"),
        ("h1000-8", r"did you mean h100-8"),
        ("nowhere.yaml", "cannot read a machine from 'nowhere.yaml'"),
    ],
)
def test_what_is_no_machine_is_refused(description: str, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        machine(description)


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ("memry: 3", "has no 'memry' .did you mean 'memory'"),
        ("like: h99", "like 'h99', which is not known"),
        ("- 1", "describes no machine"),
        ("memory: 0", "memory is 0: give a positive number"),
        ("efficiency: 2", "efficiency is 2: give a share"),
        ("reserve: 1", "reserve is 1"),
        ("teraflops: {}", "teraflops are empty"),
    ],
)
def test_a_file_that_means_nothing_is_refused(content: str, says: str, tmp_path: Path) -> None:
    file = tmp_path / "own.yaml"
    file.write_text(content)
    with pytest.raises(ValueError, match=says):
        machine(str(file))


def test_it_is_described_in_a_line() -> None:
    assert machine("h100-8x16").describe() == "16 x 8 h100, 80 GiB each"


def test_what_is_small_moves_within_caches() -> None:
    found = Machine(memory_bandwidth=10.0, cache=1.0, cache_bandwidth=100.0, reach=1.0)
    assert found.move_seconds(0.5e6) == pytest.approx(0.5e6 / 100e9)
    assert found.move_seconds(2e6) == pytest.approx(2e6 / 10e9)
    assert Machine(memory_bandwidth=10.0, reach=1.0).move_seconds(1) == pytest.approx(1e-10)
