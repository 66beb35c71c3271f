from __future__ import annotations

import os
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from killable_run import equal
from ranks import run_on_ranks
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, Shard, distribute_tensor

from lightllm.checkpoint_io import AtomicCheckpointIO, newest_checkpoint
from lightllm.sharded_checkpoint import META, read_sharded, write_sharded


def matrix(seed: int) -> Tensor:
    return torch.randn(5, 4, generator=torch.Generator().manual_seed(seed))


def checkpoint(placements: list[Any] | None) -> dict[str, Any]:
    def laid_out(tensor: Tensor) -> Tensor:
        if placements is None:
            return tensor
        mesh = init_device_mesh("cpu", (torch.distributed.get_world_size(),))
        return distribute_tensor(tensor, mesh, placements, src_data_rank=None)

    moments = {"step": torch.tensor(3.0), "exp_avg": laid_out(matrix(2)), "plain": 7}
    return {
        "global_step": 3,
        "state_dict": {"net.a": laid_out(matrix(0)), "net.b.weight": torch.arange(3)},
        "optimizer_states": [{"state": {0: moments, 4: {}}, "param_groups": [{"lr": 0.1, "params": [0, 4]}]}],
        "lr_schedulers": [{"base_lrs": [0.1]}],
    }


def write(path: Path, placements: list[Any]) -> None:
    write_sharded(checkpoint(placements), path, torch.distributed.barrier)


@pytest.mark.parametrize("placement", [Shard(0), Shard(1), Replicate()])
def test_one_process_reads_what_several_wrote(tmp_path: Path, placement: Any) -> None:
    path = tmp_path / "step=3.ckpt"
    path.write_bytes(b"a file that is replaced")
    for _ in range(2):  # the second time over the first
        run_on_ranks(write, 2, path, [placement])
        assert equal(read_sharded(path), checkpoint(None))
    assert equal(AtomicCheckpointIO().load_checkpoint(path), checkpoint(None))
    assert newest_checkpoint(tmp_path) == path
    assert os.listdir(tmp_path) == [path.name]


def read_parts(path: Path, placement: Any) -> Any:
    mesh = init_device_mesh("cpu", (torch.distributed.get_world_size(),))

    def template(name: str, size: torch.Size) -> Tensor | None:
        return distribute_tensor(torch.zeros(size), mesh, [placement]) if len(size) == 2 else None

    read = read_sharded(path, template, alone=False)
    local = read["state_dict"]["net.a"].to_local()
    read["state_dict"]["net.a"] = read["state_dict"]["net.a"].full_tensor()
    state = read["optimizer_states"][0]["state"][0]
    state["exp_avg"] = state["exp_avg"].full_tensor()
    return local.shape, read


def test_other_ranks_read_their_parts(tmp_path: Path) -> None:
    run_on_ranks(write, 2, tmp_path / "a.ckpt", [Shard(0)])
    for shape, read in run_on_ranks(read_parts, 4, tmp_path / "a.ckpt", Shard(1)):
        assert shape == (5, 1)
        assert equal(read, checkpoint(None))


class Code:
    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return print, ("code in a checkpoint was run",)


def call(module: str, name: str, argument: str) -> bytes:
    """A pickle that calls what has the name in the module, which may be one with dots."""
    texts = (b"\x8c" + bytes([len(text)]) + text.encode() for text in (module, name, argument))
    return b"\x80\x04" + next(texts) + next(texts) + b"\x93" + next(texts) + b"\x85R."


def test_reading_runs_no_code(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "a.ckpt"
    run_on_ranks(write, 1, path, [Shard(0)])
    (path / ".metadata").write_bytes(pickle.dumps(Code()))
    with pytest.raises(pickle.UnpicklingError, match=r"has a builtins.print: it is not from torch"):
        read_sharded(path)
    for module in ("filesystem", "metadata"):  # by way of what a known module has imported
        (path / ".metadata").write_bytes(call(f"torch.distributed.checkpoint.{module}", "os.system", "echo was run"))
        with pytest.raises(pickle.UnpicklingError, match=rf"has a torch.*{module}.os.system: it is not from torch"):
            read_sharded(path)
    torch.save({"global_step": Code()}, path / META)
    with pytest.raises(pickle.UnpicklingError):
        read_sharded(path)
    assert "was run" not in capfd.readouterr().out


def test_what_is_not_complete_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=f"no complete checkpoint: it has no {META}"):
        read_sharded(tmp_path)


def write_values(path: Path) -> None:
    write_sharded({"state_dict": {"a": "text"}}, path, torch.distributed.barrier)


def test_values_among_the_tensors_are_refused(tmp_path: Path) -> None:
    run_on_ranks(write_values, 1, tmp_path / "a.ckpt")
    with pytest.raises(ValueError, match=r"holds 'state_dict.a', which is no tensor"):
        read_sharded(tmp_path / "a.ckpt")
