"""The machines that a run may have: devices, their memory and speed, and the links between them."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, field, fields, replace
from difflib import get_close_matches
from pathlib import Path
from typing import Any, Literal

import yaml

GIB = 2**30


@dataclass(frozen=True)
class Machine:
    """Equal nodes of equal devices. Speeds are those of the data sheet; what of them is reached is `efficiency`.

    Args:
        devices: On each node.
        nodes: How many nodes.
        memory: Of each device, in GiB.
        teraflops: Of dense products, by the type of their factors: `{bfloat16: 989.4, float32: 66.9}`.
        memory_bandwidth: Of each device, in GB/s.
        link: From one device to the others of its node, in GB/s, each way.
        network: From one device to other nodes, in GB/s, each way.
        link_latency: Of a message within the node, in microseconds.
        network_latency: Of a message between nodes, in microseconds.
        start: What it takes to start an operation, in microseconds.
        efficiency: What share of `teraflops` large products reach.
        reach: What share of a bandwidth large transfers reach.
        reserve: What share of the memory is left free: libraries, fragments.
        cache: What an operation may read and write to do so at `cache_bandwidth`, in MB; 0 where that is never so.
        cache_bandwidth: In GB/s.
        kind: `cpu` computes, sends and starts operations one after another; `cuda` at once.
        name: For the table.

    Raises:
        ValueError: A number is not positive, or a share not in (0, 1].
    """

    devices: int = 1
    nodes: int = 1
    memory: float = 80.0
    teraflops: dict[str, float] = field(default_factory=lambda: {"bfloat16": 989.4, "float32": 66.9})
    memory_bandwidth: float = 3350.0
    link: float = 450.0
    network: float = 50.0
    link_latency: float = 10.0
    network_latency: float = 25.0
    start: float = 6.0
    efficiency: float = 0.7
    reach: float = 0.8
    reserve: float = 0.06
    cache: float = 0.0
    cache_bandwidth: float = 0.0
    kind: Literal["cuda", "cpu"] = "cuda"
    name: str = ""

    def __post_init__(self) -> None:
        """Refuse what no machine is."""
        for name in ("devices", "nodes", "memory", "memory_bandwidth", "link", "network"):
            if not getattr(self, name) > 0:
                raise ValueError(f"a machine's {name} is {getattr(self, name)}: give a positive number")
        for name in ("efficiency", "reach"):
            if not 0 < getattr(self, name) <= 1:
                raise ValueError(f"a machine's {name} is {getattr(self, name)}: give a share in (0, 1]")
        if not 0 <= self.reserve < 1:
            raise ValueError(f"a machine's reserve is {self.reserve}: give a share in [0, 1)")
        if not self.teraflops:
            raise ValueError("a machine's teraflops are empty: give {bfloat16: …, float32: …}")

    @property
    def world_size(self) -> int:
        """All devices."""
        return self.devices * self.nodes

    @property
    def usable_bytes(self) -> float:
        """What of a device's memory tensors may take."""
        return self.memory * (1 - self.reserve) * GIB

    def rate(self, dtype: str) -> float:
        """FLOP/s that large products of a type reach."""
        known = self.teraflops.get(dtype) or self.teraflops.get("bfloat16" if dtype == "float16" else "float32")
        return (known or min(self.teraflops.values())) * 1e12 * self.efficiency

    def move_seconds(self, size: float) -> float:
        """How long an operation takes to read and write so many bytes."""
        bandwidth = self.cache_bandwidth if size < self.cache * 1e6 else self.memory_bandwidth
        return size / (bandwidth * 1e9 * self.reach)

    def describe(self) -> str:
        """A line: `16 x 8 h100, 80 GiB each`."""
        nodes = f"{self.nodes} x " if self.nodes > 1 else ""
        return f"{nodes}{self.devices} {self.name or self.kind}, {self.memory:.4g} GiB each"


_H100 = Machine(name="h100")
KNOWN = {
    # From the vendors' data sheets: dense products, memory, NVLink (half of the bidirectional figure), and the network
    # of the vendors' own eight-device nodes, a share to each device. TF32 is not counted as float32.
    "h100": _H100,
    "h100-96": replace(_H100, name="h100-96", memory=95.0, memory_bandwidth=2400.0),
    "h200": replace(_H100, name="h200", memory=139.8, memory_bandwidth=4800.0),
    "b200": Machine(
        name="b200",
        memory=178.0,
        teraflops={"bfloat16": 2250.0, "float32": 75.0},
        memory_bandwidth=7700.0,
        link=900.0,
    ),
    "a100": Machine(
        name="a100",
        teraflops={"bfloat16": 312.0, "float32": 19.5},
        memory_bandwidth=2039.0,
        link=300.0,
        network=25.0,
    ),
    "a100-40": Machine(
        name="a100-40",
        memory=40.0,
        teraflops={"bfloat16": 312.0, "float32": 19.5},
        memory_bandwidth=1555.0,
        link=300.0,
        network=25.0,
    ),
    "l40s": Machine(
        name="l40s",
        memory=48.0,
        teraflops={"bfloat16": 362.0, "float32": 91.6},
        memory_bandwidth=864.0,
        link=31.5,
        network=12.5,
    ),
    "rtx4090": Machine(
        name="rtx4090",
        memory=24.0,
        teraflops={"bfloat16": 165.2, "float32": 82.6},
        memory_bandwidth=1008.0,
        link=31.5,
        network=3.1,
    ),
    "mi300x": Machine(
        name="mi300x",
        memory=192.0,
        teraflops={"bfloat16": 1307.4, "float32": 163.4},
        memory_bandwidth=5300.0,
        link=448.0,
    ),
}
"""Devices by name."""

_NAME = re.compile(r"(?P<device>.+?)-(?P<devices>\d+)(x(?P<nodes>\d+))?")


def machine(description: str) -> Machine:
    """Read a machine off its name or its file.

    Args:
        description: `h100-8` (a node of eight), `a100-8x16` (sixteen such nodes), or a YAML or JSON file of the fields
            of `Machine`, which may begin from a device by `like: h100`.

    Raises:
        ValueError: No such device or file, or the file has a field that a machine does not have.
    """
    file = Path(description)
    if file.suffix in (".yaml", ".yml", ".json") or file.is_file():
        return _from_file(file)
    match = _NAME.fullmatch(description)
    if match is None or match["device"] not in KNOWN:
        device = match["device"] if match else description
        near = get_close_matches(device, KNOWN, n=1)
        hint = f" (did you mean {near[0]}-{match['devices'] if match else 8}?)" if near else ""
        raise ValueError(
            f"no machine {description!r}{hint}: name a device and how many a node has, such as h100-8 or a100-8x16 "
            f"for sixteen nodes (known: {', '.join(KNOWN)}), or give a YAML file with its memory and speeds"
        )
    return replace(KNOWN[match["device"]], devices=int(match["devices"]), nodes=int(match["nodes"] or 1))


def _from_file(file: Path) -> Machine:
    try:
        text = file.read_text(encoding="utf-8")
        content: Any = json.loads(text) if file.suffix == ".json" else yaml.safe_load(text)
    except (OSError, UnicodeDecodeError, yaml.YAMLError, json.JSONDecodeError) as error:
        raise ValueError(f"cannot read a machine from {str(file)!r}: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{str(file)!r} describes no machine: give fields such as devices, memory and teraflops")
    like = content.pop("like", None)
    if like is not None and like not in KNOWN:
        raise ValueError(f"{str(file)!r} is like {like!r}, which is not known: take one of {', '.join(KNOWN)}")
    known = [one.name for one in fields(Machine)]
    for name in content:
        if name not in known:
            near = get_close_matches(str(name), known, n=1)
            raise ValueError(
                f"{str(file)!r}: a machine has no {name!r}{f' (did you mean {near[0]!r}?)' if near else ''}; its "
                f"fields are {', '.join(known)}"
            )
    return replace(KNOWN[like], **content) if like is not None else Machine(**content)
