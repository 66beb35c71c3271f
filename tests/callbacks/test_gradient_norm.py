from __future__ import annotations

import math
import os
import socket
from pathlib import Path

import pytest
import torch
import torch.multiprocessing
from tiny_networks import tiny_llama
from tiny_run import TinyModule, tiny_batches, tiny_loader, tiny_trainer
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, Shard, distribute_tensor

from lightllm.callbacks import GradientNorm
from lightllm.loggers import RunCSVLogger
from lightllm.parallel.clipping import gradient_norm

pytestmark = pytest.mark.filterwarnings("ignore::lightning.fabric.utilities.warnings.PossibleUserWarning")


def reference(module: TinyModule, batches: int) -> dict[str, float]:
    """The gradient's squares of the first step, added up by hand."""
    losses = [module._loss(batch) for batch in tiny_batches(batches)]
    (sum(loss / weight for loss, weight in losses) / batches).backward()  # type: ignore[union-attr]
    squares = {"block_00": 0.0, "block_01": 0.0, "rest": 0.0}
    for name, parameter in module.network.named_parameters():
        assert parameter.grad is not None
        group = next((f"block_0{i}" for i in range(2) if f"layers.{i}." in name), "rest")
        squares[group] += float(parameter.grad.double().square().sum())
    return squares


def test_the_norm_before_clipping_in_all_and_per_block(tmp_path: Path) -> None:
    squares = reference(TinyModule(), batches=2)
    trainer = tiny_trainer(
        tmp_path, [GradientNorm(per_block=True)], max_steps=1, accumulate_grad_batches=2, gradient_clip_val=1e-3
    )
    trainer.fit(TinyModule(), tiny_loader(tiny_batches(2)))
    assert trainer.callback_metrics["train/gradient_norm"] == pytest.approx(math.sqrt(sum(squares.values())), rel=1e-5)
    for group, square in squares.items():
        assert trainer.callback_metrics[f"gradient_norm/{group}"] == pytest.approx(math.sqrt(square), rel=1e-5)


def test_without_blocks_only_the_total_is_logged(tmp_path: Path) -> None:
    squares = reference(TinyModule(), batches=1)
    trainer = tiny_trainer(tmp_path, [GradientNorm()], max_steps=1)
    trainer.fit(TinyModule(), tiny_loader(tiny_batches(1)))
    assert trainer.callback_metrics["train/gradient_norm"] == pytest.approx(math.sqrt(sum(squares.values())), rel=1e-5)
    assert not [name for name in trainer.callback_metrics if name.startswith("gradient_norm/")]


def test_only_steps_that_are_logged_are_measured(tmp_path: Path) -> None:
    trainer = tiny_trainer(tmp_path, [GradientNorm()], [RunCSVLogger(tmp_path)], max_steps=5, log_every_n_steps=2)
    trainer.fit(TinyModule(), tiny_loader(tiny_batches(5)))
    lines = [line.split(",") for line in (tmp_path / "metrics.csv").read_text().splitlines()]
    column = lines[0].index("train/gradient_norm")
    assert [line[0] for line in lines[1:]] == ["1", "3"]
    assert len({line[column] for line in lines[1:]}) == 2


def test_nothing_has_no_norm() -> None:
    assert gradient_norm(tiny_llama().parameters()) == 0


def _on_two_ranks(rank: int, port: int) -> None:
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.distributed.init_process_group("gloo", rank=rank, world_size=2)
    mesh = init_device_mesh("cpu", (2,))
    plain, sharded, replicated = (nn.Parameter(torch.zeros(4, 4)) for _ in range(3))
    plain.grad = torch.full((4, 4), 1.0)
    values = torch.arange(16.0).view(4, 4)
    sharded = nn.Parameter(distribute_tensor(torch.zeros(4, 4), mesh, [Shard(0)]))
    sharded.grad = distribute_tensor(values, mesh, [Shard(0)])
    replicated = nn.Parameter(distribute_tensor(torch.zeros(4, 4), mesh, [Replicate()]))
    replicated.grad = distribute_tensor(values, mesh, [Replicate()])
    norm = gradient_norm([plain, sharded, replicated])
    assert norm.item() == pytest.approx(math.sqrt(16 + 2 * float(values.square().sum())))
    torch.distributed.destroy_process_group()


def test_sharded_gradients_are_summed_over_ranks() -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    torch.multiprocessing.start_processes(_on_two_ranks, args=(port,), nprocs=2, start_method="fork")
