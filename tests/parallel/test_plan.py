"""The planner against what torch allocates in a real run of the same configuration."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from measured_memory import peak_allocated
from planned_run import CPU, Case, measured_peak, train
from ranks import run_on_ranks

from lightllm.models import Frozen, LoRA
from lightllm.parallel import ParallelStrategy, PipelineParallelStrategy
from lightllm.parallel.degrees import Degrees
from lightllm.parallel.plan import Planner
from lightllm.parallel.plan_layout import Layout

CASES = [
    Case("full"),
    Case("tied", fields={"tie_word_embeddings": True}),
    Case("recomputed", recompute=True, rows=8),
    Case("bfloat16", dtype="bfloat16"),
    Case("mixed", precision="bf16-mixed"),
    Case("mixed and recomputed", precision="bf16-mixed", recompute=True, rows=8),
    Case("lora", adapter=LoRA(rank=8)),
    Case("lora on bfloat16", adapter=LoRA(rank=8), dtype="bfloat16", rows=8),
    Case("lora recomputed", adapter=LoRA(rank=8), recompute=True, rows=8),
    Case("lora with dropout", adapter=LoRA(rank=8, dropout=0.1)),
    Case("deep", fields={"num_hidden_layers": 12}, rows=2),
    Case("wide vocabulary", fields={"vocab_size": 20000}, rows=2),
    Case("long rows", rows=1, length=512),
    Case("packed documents", document=32),
    Case("packed documents in bfloat16", document=32, dtype="bfloat16"),
    Case("accumulated", accumulate=3),
    Case("frozen below", adapter=Frozen(num_blocks=2)),
    Case("gpt2", architecture="gpt2", fields={"n_embd": 96, "n_layer": 4, "n_head": 6, "n_positions": 512}),
    Case("qwen3", architecture="qwen3", fields={"head_dim": 16}),
    Case("momentum", optimizer=lambda parameters: torch.optim.SGD(parameters, lr=0.1, momentum=0.9)),
    Case("few tokens and a plain optimizer", rows=1, length=16, optimizer=torch.optim.AdamW),
    Case(
        "few tokens and many tokens to choose from",
        fields={"vocab_size": 20000, "tie_word_embeddings": True},
        rows=1,
        length=16,
    ),
]


def estimated_peak(case: Case) -> float:
    layout = Layout(Degrees(1, 1, 1, 1), case.rows, case.accumulate, case.recompute)
    return Planner(case.job(), CPU).estimate(layout).memory.peak


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_the_peak_of_one_device_is_what_torch_allocates(case: Case, tmp_path: Path) -> None:
    assert estimated_peak(case) == pytest.approx(measured_peak(case, tmp_path), rel=0.15)


SPREAD = {
    "copies": ("full", Layout(Degrees(2, 1, 1, 1), 4, 1, False)),
    "copies of lora": ("lora", Layout(Degrees(2, 1, 1, 1), 4, 1, False)),
    "shards": ("full", Layout(Degrees(1, 2, 1, 1), 4, 1, False)),
    "shards recomputed": ("recomputed", Layout(Degrees(1, 2, 1, 1), 8, 1, True)),
    "shards of lora": ("lora", Layout(Degrees(1, 2, 1, 1), 4, 1, False)),
    "shared matrices": ("full", Layout(Degrees(1, 1, 2, 1), 4, 1, False)),
    "shared vocabulary": ("wide vocabulary", Layout(Degrees(1, 1, 2, 1), 2, 1, False)),
    "stages": ("full", Layout(Degrees(1, 1, 1, 2), 2, 4, False, "1f1b")),
    "stages recomputed": ("recomputed", Layout(Degrees(1, 1, 1, 2), 2, 4, True, "1f1b")),
    "stages in turn": ("full", Layout(Degrees(1, 1, 1, 2), 2, 4, False, "interleaved_1f1b")),
}


def strategy(layout: Layout) -> object:
    degrees = layout.degrees
    if layout.schedule is not None:
        return PipelineParallelStrategy(degrees.pipeline, layout.microbatches, layout.schedule)
    if degrees.tensor == layout.shard == 1:
        return "ddp"
    return ParallelStrategy(degrees.replicate, layout.shard, degrees.tensor)


def peak_on_this_rank(case: Case, layout: Layout, folder: Path) -> int:
    rows = layout.rows * (layout.microbatches if layout.schedule else 1)
    batches = case.batches(2, rows)
    return peak_allocated(lambda: train(case, folder, batches, devices=2, strategy=strategy(layout)))


@pytest.mark.parametrize("name", SPREAD)
def test_the_peak_of_the_fullest_of_two_ranks_is_what_torch_allocates(name: str, tmp_path: Path) -> None:
    label, layout = SPREAD[name]
    case = next(one for one in CASES if one.name == label)
    measured = max(run_on_ranks(peak_on_this_rank, 2, case, layout, tmp_path))
    assert Planner(case.job(), CPU).estimate(layout).memory.peak == pytest.approx(measured, rel=0.15)
