"""The tables of docs/scaling.md: what the planner says of Llama 3.1's shapes, and beside what torchtitan published.

    python docs/scaling.py

It takes a minute or two, and no GPU.
"""

from __future__ import annotations

from dataclasses import replace
from typing import NamedTuple

import torch

from lightllm.models import FromConfig, Full
from lightllm.models.empty_network import empty_network
from lightllm.modules.base import adamw
from lightllm.parallel.degrees import Degrees
from lightllm.parallel.machine import GIB, KNOWN, Machine
from lightllm.parallel.optimizer_cost import optimizer_cost
from lightllm.parallel.plan import Job, Planner, reason
from lightllm.parallel.plan_layout import Layout
from lightllm.parallel.schedules import ScheduleName

LENGTH = 8192
SHAPES = {
    "1B": (2048, 8192, 16, 32, 8, True),
    "8B": (4096, 14336, 32, 32, 8, False),
    "70B": (8192, 28672, 80, 64, 8, False),
    "405B": (16384, 53248, 126, 128, 8, False),
}
"""Hidden size, neurons, blocks, heads, key/value heads, tied."""


def job(size: str, compiled: bool = False, length: int = LENGTH) -> Job:
    """Pretraining of all weights: float32 weights and AdamW, bfloat16 products."""
    hidden, inner, blocks, heads, groups, tied = SHAPES[size]
    fields = {
        "hidden_size": hidden,
        "intermediate_size": inner,
        "num_hidden_layers": blocks,
        "num_attention_heads": heads,
        "num_key_value_heads": groups,
        "vocab_size": 128256,
        "max_position_embeddings": 131072,
        "tie_word_embeddings": tied,
    }
    network = empty_network(FromConfig("llama", fields), "causal")
    return Job(
        bare=network,
        adapted=network,
        adapter=Full(),
        length=length,
        document=length,
        optimizer=optimizer_cost(adamw, torch.float32, "cuda"),
        autocast=torch.bfloat16,
        is_compiled=compiled,
    )


class Published(NamedTuple):
    """A row of torchtitan's benchmarks."""

    size: str
    devices: int
    degrees: Degrees
    rows: int
    microbatches: int
    recompute: str
    """`selective` (part of each block) or `full`."""
    how: str
    schedule: ScheduleName | None
    tokens_per_second: float
    """Of each GPU."""
    memory: float
    """GiB of the fullest GPU; 0 where none is given."""


TORCHTITAN = [
    Published("8B", 8, Degrees(1, 8, 1, 1), 2, 1, "selective", "eager", None, 5762, 82.4),
    Published("8B", 8, Degrees(1, 8, 1, 1), 2, 1, "selective", "compiled", None, 6667, 77.0),
    Published("8B", 128, Degrees(1, 128, 1, 1), 2, 1, "selective", "eager", None, 5605, 67.0),
    Published("8B", 128, Degrees(1, 128, 1, 1), 2, 1, "selective", "compiled", None, 6514, 62.0),
    Published("8B", 64, Degrees(1, 8, 8, 1), 12, 1, "selective", "compiled", None, 4378, 0.0),
    Published("70B", 256, Degrees(1, 32, 8, 1), 16, 1, "full", "compiled", None, 597.3, 0.0),
    Published("70B", 256, Degrees(1, 32, 8, 1), 16, 1, "full", "compiled, float8", None, 829, 71.9),
    Published("405B", 512, Degrees(1, 8, 8, 8), 1, 32, "full", "compiled, float8", "1f1b", 100, 82.5),
    Published("405B", 512, Degrees(1, 8, 8, 8), 1, 32, "full", "compiled, float8", "interleaved_1f1b", 128, 72.7),
]
"""https://github.com/pytorch/torchtitan, benchmarks/llama3_h100_202412_torchtitan.md and
asyncTP_llama3_h100_2025-06_torchtitan.md, at b5bcd76; on its H100 of 96 GB and 2.4 TB/s, limited to 500 W."""


def compared() -> list[str]:
    """Rows of a Markdown table: what was published, what the planner says, and by how much it is off."""
    lines = [
        "| model | GPUs | spread | published tokens/s | planned | off | published GiB | planned |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for one in TORCHTITAN:
        machine = replace(KNOWN["h100-96"], devices=8, nodes=one.devices // 8)
        planner = Planner(job(one.size, one.how != "eager"), machine)
        ways = (False, True) if one.recompute == "selective" else (True,)
        plain = Layout(one.degrees, one.rows, one.microbatches, False, one.schedule)
        found = [planner.estimate(replace(plain, recompute=way)) for way in ways]
        offs = [each.tokens_per_second / one.tokens_per_second - 1 for each in found]
        cells = [
            one.size,
            str(one.devices),
            f"{plain.describe()}, {one.rows} rows, {one.recompute} recomputation, {one.how}",
            f"{one.tokens_per_second:,.0f}",
            " / ".join(f"{each.tokens_per_second:,.0f}" for each in found),
            " / ".join(f"{off:+.0%}" for off in offs),
            f"{one.memory}" if one.memory else "",
            " / ".join(f"{each.memory.peak / GIB:.1f}" for each in found),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def planned(size: str, devices: tuple[int, ...], step_tokens: int) -> list[str]:
    """Rows of a Markdown table: the best that the planner finds for so many H100 of 80 GB."""
    lines = [
        "| GPUs | best | rows x micro-batches | recomputed | GiB | s/step | tokens/s each | of peak | beside it |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    made = job(size, compiled=True)
    for count in devices:
        machine = replace(KNOWN["h100"], devices=8, nodes=count // 8)
        planner = Planner(made, machine)
        best = planner.rank(step_tokens)[0]
        cells = [
            f"{count:,}",
            best.layout.describe(),
            f"{best.layout.rows} x {best.layout.microbatches}",
            "yes" if best.layout.recompute else "",
            f"{best.memory.peak / GIB:.1f}",
            f"{best.time.seconds:.2f}" if best.fits else "",
            f"{best.tokens_per_second:,.0f}" if best.fits else "",
            f"{share_of_peak(size, best.tokens_per_second, machine):.0%}" if best.fits else "",
            reason(best, machine),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def share_of_peak(size: str, tokens_per_second: float, machine: Machine) -> float:
    """Model FLOPs over what the data sheet promises; attention counts each token's predecessors."""
    from lightllm.flops import attention_width, step_flops
    from lightllm.models.anatomy import output_head

    network = job(size).bare
    flops = step_flops(network, output_head(network).weight, attention_width(network.config))  # type: ignore[arg-type]
    per_token = flops.per_token + flops.per_target + flops.per_pair * LENGTH / 2
    return tokens_per_second * per_token / (machine.teraflops["bfloat16"] * 1e12)


def main() -> None:
    """Print all tables."""
    print("\n".join(compared()))
    million = 2**20
    for size, devices, tokens in (
        ("1B", (8, 64, 512), million),
        ("8B", (8, 64, 512, 1024), 4 * million),
        ("70B", (8, 64, 512, 2048), 4 * million),
        ("405B", (64, 512, 2048, 4096), 16 * million),
    ):
        print(f"\n{size}, {tokens // million} Mi tokens a step\n", flush=True)
        print("\n".join(planned(size, devices, tokens)), flush=True)


if __name__ == "__main__":
    main()
