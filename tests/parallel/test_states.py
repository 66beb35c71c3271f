from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from killable_run import equal
from ranks import run_on_ranks
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

from lightllm.parallel.states import gathered, load_optimizer, load_weights, part_like, read_checkpoint
from lightllm.sharded_checkpoint import write_sharded


def network(placement: Any = None) -> nn.Linear:
    layer = nn.Linear(3, 5)
    with torch.no_grad():
        layer.weight.copy_(torch.arange(15.0).view(5, 3))
        layer.bias.copy_(torch.arange(5.0))
    if placement is not None:
        mesh = init_device_mesh("cpu", (torch.distributed.get_world_size(),))
        layer.weight = nn.Parameter(distribute_tensor(layer.weight.detach(), mesh, [placement], src_data_rank=None))
    return layer


def trained(placement: Any = None, steps: int = 2) -> tuple[nn.Linear, torch.optim.Optimizer]:
    layer = network(placement)
    optimizer = torch.optim.AdamW([layer.weight], lr=0.1)
    for step in range(steps):
        gradient = torch.full((5, 3), 1.0 + step) * torch.arange(3.0)
        layer.weight.grad = part_like(gradient, layer.weight)
        optimizer.step()
    return layer, optimizer


def state(layer: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    return {"state_dict": layer.state_dict(), "optimizer_states": [optimizer.state_dict()]}


def whole(layer: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    found: dict[str, Any] = gathered(state(layer, optimizer), keep=True)
    return found


def resume(path: Path, placement: Any) -> tuple[dict[str, Any], bool]:
    layer, optimizer = trained(placement, steps=0)
    checkpoint = read_checkpoint(path, layer, [optimizer])
    in_parts = isinstance(checkpoint["state_dict"]["weight"], DTensor)
    with torch.no_grad():
        layer.bias.zero_()
    load_weights(layer, checkpoint["state_dict"])
    load_optimizer(optimizer, checkpoint["optimizer_states"][0])
    assert isinstance(optimizer.state_dict()["state"][0]["exp_avg"], DTensor)
    return whole(layer, optimizer), in_parts


def save(path: Path, placement: Any) -> None:
    write_sharded(state(*trained(placement)), path, torch.distributed.barrier)


def test_a_file_and_a_folder_are_loaded_into_any_layout(tmp_path: Path) -> None:
    expected = whole(*trained())
    torch.save(expected, tmp_path / "file.ckpt")
    run_on_ranks(save, 2, tmp_path / "folder.ckpt", Shard(0))
    for placement in (Shard(1), Replicate()):
        for name in ("file.ckpt", "folder.ckpt"):
            for found, in_parts in run_on_ranks(resume, 3, tmp_path / name, placement):
                assert equal(found, expected)
                assert in_parts == (name == "folder.ckpt")


def gather_on_the_first() -> list[Tensor | None]:
    layer = network(Shard(0))
    found: list[Tensor | None] = gathered([layer.weight, layer.bias], keep=torch.distributed.get_rank() == 0)
    return found


def test_only_who_keeps_it_gets_the_whole() -> None:
    first, second = run_on_ranks(gather_on_the_first, 2)
    assert first[0] is not None
    assert torch.equal(first[0], network().weight)
    assert second[0] is None
