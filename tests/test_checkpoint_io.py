from __future__ import annotations

import os
import shutil
import signal
import sys
import time
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import pytest
import torch

from lightllm.checkpoint_io import (
    AtomicCheckpointIO,
    alias_checkpoint,
    newest_checkpoint,
    remove_temporaries,
)
from lightllm.sharded_checkpoint import replace_folder, restore_former


def save(path: Path, step: int, size: int = 10) -> Path:
    AtomicCheckpointIO().save_checkpoint({"global_step": step, "weights": torch.full((size,), float(step))}, path)
    return path


def test_saves_what_it_loads_and_nothing_else_is_left(tmp_path: Path) -> None:
    path = save(tmp_path / "new" / "step=1.ckpt", 1)
    loaded = AtomicCheckpointIO().load_checkpoint(path)
    assert loaded["global_step"] == 1
    assert torch.equal(loaded["weights"], torch.ones(10))
    assert [file.name for file in path.parent.iterdir()] == ["step=1.ckpt"]


class Code:
    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return print, ("code in a checkpoint was run",)


def test_runs_no_code_unless_asked(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "foreign.ckpt"
    torch.save({"global_step": 1, "code": Code()}, path)
    with pytest.raises(Exception, match="weights_only"):
        AtomicCheckpointIO().load_checkpoint(path)
    assert "code" not in capsys.readouterr().out
    AtomicCheckpointIO().load_checkpoint(path, weights_only=False)
    assert "code in a checkpoint was run" in capsys.readouterr().out


def test_failed_save_keeps_the_old_file_and_no_rest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = save(tmp_path / "step=1.ckpt", 1)

    def fail(_: object, target: Path) -> None:
        target.write_bytes(b"half")
        raise OSError("No space left on device")

    monkeypatch.setattr(torch, "save", fail)
    with pytest.raises(OSError, match="No space"):
        save(path, 2)
    assert os.listdir(tmp_path) == ["step=1.ckpt"]
    assert AtomicCheckpointIO().load_checkpoint(path)["global_step"] == 1


def save_for_ever(folder: Path) -> None:
    for step in range(1, 1_000_000):
        save(folder / "last.ckpt", step, size=2_000_000)


@pytest.mark.skipif(sys.platform == "win32", reason="needs SIGKILL")
def test_killed_while_it_writes_leaves_a_whole_file(tmp_path: Path) -> None:
    seen_half_written = 0
    for _ in range(8):
        process = get_context("fork").Process(target=save_for_ever, args=(tmp_path,))
        process.start()
        begun = time.monotonic()
        while not list(tmp_path.glob("*.tmp-*")) and time.monotonic() - begun < 10:
            time.sleep(0.001)
        os.kill(process.pid or 0, signal.SIGKILL)
        process.join()
        seen_half_written += len(list(tmp_path.glob("*.tmp-*")))
        for path in tmp_path.glob("*.ckpt"):
            state = AtomicCheckpointIO().load_checkpoint(path)
            assert bool((state["weights"] == state["global_step"]).all())
        remove_temporaries(tmp_path)
        assert not list(tmp_path.glob("*.tmp-*"))
    assert seen_half_written


def test_newest_is_the_one_with_the_most_steps_whatever_its_name_or_age(tmp_path: Path) -> None:
    assert newest_checkpoint(tmp_path) is None
    assert newest_checkpoint(tmp_path / "none") is None
    save(tmp_path / "step=100.ckpt", 100)
    newest = save(tmp_path / "mine.ckpt", 101)
    save(tmp_path / "step=20.ckpt", 20)
    assert newest_checkpoint(tmp_path) == newest
    (tmp_path / "step=200.ckpt.tmp-77").write_bytes(newest.read_bytes())
    assert newest_checkpoint(tmp_path) == newest


def test_newest_is_named_by_its_own_name_rather_than_an_alias(tmp_path: Path) -> None:
    path = save(tmp_path / "step=100.ckpt", 100)
    alias_checkpoint(path, "last.ckpt")
    alias_checkpoint(path, "best.ckpt")
    assert newest_checkpoint(tmp_path) == path


def damaged(whole: bytes) -> dict[str, bytes]:
    return {
        "empty": b"",
        "cut off": whole[: len(whole) // 2],
        "one byte short": whole[:-1],
        "its end only": whole[-200:],
        "text": b"not a checkpoint",
        "no step": b"",
    }


@pytest.mark.parametrize("damage", damaged(b""))
def test_newest_passes_over_a_damaged_file(tmp_path: Path, damage: str) -> None:
    good = save(tmp_path / "step=1.ckpt", 1)
    bad = save(tmp_path / "step=2.ckpt", 2, size=5000)
    if damage == "no step":
        torch.save({"weights": torch.ones(2)}, bad)
    else:
        bad.write_bytes(damaged(bad.read_bytes())[damage])
    with pytest.warns(UserWarning, match="step=2.ckpt is passed over"):
        assert newest_checkpoint(tmp_path) == good


def test_newest_takes_a_sharded_checkpoint_once_its_last_file_is_there(tmp_path: Path) -> None:
    good = save(tmp_path / "step=1.ckpt", 1)
    sharded = tmp_path / "step=2.ckpt"
    sharded.mkdir()
    with pytest.warns(UserWarning, match="not complete"):
        assert newest_checkpoint(tmp_path) == good
    torch.save({"global_step": 2}, sharded / "meta.pt")
    assert newest_checkpoint(tmp_path) == sharded


def test_alias_outlives_the_first_name_and_moves_on(tmp_path: Path) -> None:
    first, second = save(tmp_path / "step=1.ckpt", 1), save(tmp_path / "step=2.ckpt", 2)
    alias = alias_checkpoint(first, "best.ckpt")
    assert alias.samefile(first)  # no second copy on the disk
    first.unlink()
    assert AtomicCheckpointIO().load_checkpoint(alias)["global_step"] == 1
    assert alias_checkpoint(second, "best.ckpt") == alias
    assert AtomicCheckpointIO().load_checkpoint(alias)["global_step"] == 2
    assert alias_checkpoint(second, "best.ckpt").samefile(second)
    assert sorted(os.listdir(tmp_path)) == ["best.ckpt", "step=2.ckpt"]


def test_alias_is_a_copy_where_there_are_no_links(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise OSError("Operation not supported")

    monkeypatch.setattr(os, "link", refuse)
    path = save(tmp_path / "step=1.ckpt", 1)
    alias = alias_checkpoint(path, "last.ckpt")
    assert not alias.samefile(path)
    assert alias.read_bytes() == path.read_bytes()


def test_alias_of_a_sharded_checkpoint_outlives_it(tmp_path: Path) -> None:
    for step in (1, 2):
        sharded = tmp_path / f"step={step}.ckpt"
        sharded.mkdir()
        torch.save({"global_step": step}, sharded / "meta.pt")
        alias = alias_checkpoint(sharded, "last.ckpt")
        assert (alias / "meta.pt").samefile(sharded / "meta.pt")  # no second copy on the disk
        assert torch.load(alias / "meta.pt")["global_step"] == step
    assert newest_checkpoint(tmp_path) == tmp_path / "step=2.ckpt"
    shutil.rmtree(tmp_path / "step=2.ckpt")
    assert newest_checkpoint(tmp_path) == tmp_path / "last.ckpt"
    assert sorted(os.listdir(tmp_path)) == ["last.ckpt", "step=1.ckpt"]


def test_a_file_takes_the_place_of_a_sharded_checkpoint(tmp_path: Path) -> None:
    (tmp_path / "last.ckpt").mkdir()
    torch.save({"global_step": 1}, tmp_path / "last.ckpt" / "meta.pt")
    path = save(tmp_path / "step=2.ckpt", 2)
    assert AtomicCheckpointIO().load_checkpoint(alias_checkpoint(path, "last.ckpt"))["global_step"] == 2
    assert sorted(os.listdir(tmp_path)) == ["last.ckpt", "step=2.ckpt"]


def test_leftovers_of_a_killed_process_are_removed(tmp_path: Path) -> None:
    good = save(tmp_path / "step=1.ckpt", 1)
    (tmp_path / "step=2.ckpt.tmp-77").write_bytes(b"half")
    (tmp_path / "step=3.ckpt.tmp-parts").mkdir()
    (tmp_path / "step=3.ckpt.tmp-parts" / "__0_0.distcp").write_bytes(b"half")
    remove_temporaries(tmp_path)
    assert os.listdir(tmp_path) == [good.name]


def sharded(path: Path, step: int) -> Path:
    path.mkdir()
    torch.save({"global_step": step}, path / "meta.pt")
    return path


def test_what_was_about_to_be_replaced_gets_its_name_again(tmp_path: Path) -> None:
    sharded(tmp_path / "last.ckpt.tmp-former", 3)  # killed between the two renames
    sharded(tmp_path / "last.ckpt.tmp-parts", 4)
    remove_temporaries(tmp_path)
    assert os.listdir(tmp_path) == ["last.ckpt"]
    assert newest_checkpoint(tmp_path) == tmp_path / "last.ckpt"
    sharded(tmp_path / "last.ckpt.tmp-former", 2)  # killed after both
    remove_temporaries(tmp_path)
    assert os.listdir(tmp_path) == ["last.ckpt"]
    assert torch.load(tmp_path / "last.ckpt" / "meta.pt")["global_step"] == 3


@pytest.mark.parametrize("kind", ["file", "folder"])
def test_a_replacement_that_fails_leaves_the_former_whole(tmp_path: Path, kind: str) -> None:
    path = save(tmp_path / "a.ckpt", 1) if kind == "file" else sharded(tmp_path / "a.ckpt", 1)
    with pytest.raises(FileNotFoundError):
        replace_folder(tmp_path / "gone", path)
    assert newest_checkpoint(tmp_path) is None
    restore_former(tmp_path)
    assert newest_checkpoint(tmp_path) == path
