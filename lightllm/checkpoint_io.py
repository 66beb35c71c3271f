"""Checkpoint files that are either whole or not there, and how the newest whole one is found."""

from __future__ import annotations

import os
import pickle
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins import TorchCheckpointIO
from lightning.pytorch.utilities import rank_zero_warn
from typing_extensions import override

from lightllm.sharded_checkpoint import META, flush_to_disk, link_folder, read_sharded, replace_folder, restore_former


class AtomicCheckpointIO(TorchCheckpointIO):
    """Writes beside the target, waits for the disk, then renames: a crash at any moment leaves the old file or the new.

    Loads tensors and plain values only, so that a checkpoint from elsewhere runs no code, unless the caller says
    `weights_only=False`.
    """

    @override
    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any | None = None) -> None:
        if "://" in str(path) or storage_options is not None:
            super().save_checkpoint(checkpoint, path, storage_options)  # an object store shows whole objects only
            return
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        _replace(Path(path), lambda temporary: torch.save(checkpoint, temporary))
        flush_to_disk(Path(path).parent)

    @override
    def load_checkpoint(
        self, path: str | Path, map_location: Any | None = "cpu", weights_only: bool | None = None
    ) -> dict[str, Any]:
        if Path(path).is_dir():  # of a run whose ranks each wrote their parts
            return read_sharded(Path(path))
        return super().load_checkpoint(path, map_location, weights_only=weights_only is not False)


def newest_checkpoint(folder: str | Path) -> Path | None:
    """Find the complete checkpoint with the most optimizer steps; None where there is none.

    A file that a crash or a copy cut off is passed over with a warning. Of two names for the same step, the one
    that was written first is taken (`step=100.ckpt` rather than its aliases `best.ckpt` and `last.ckpt`).
    """
    steps = {path: _global_step(path) for path in sorted(Path(folder).glob("*.ckpt"), key=_is_alias)}
    complete = {path: step for path, step in steps.items() if step is not None}
    return max(complete, key=lambda path: complete[path], default=None)


def read_checkpoint(path: str | Path) -> dict[str, Any]:
    """Read a checkpoint's file or folder whole, into the processor's memory."""
    if Path(path).is_dir():
        return read_sharded(Path(path))
    checkpoint: dict[str, Any] = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
    return checkpoint


def read_entry(path: str | Path, key: str, default: Any) -> Any:
    """Read one entry of a checkpoint, beside which no weight is loaded; `default` where it has none."""
    file = Path(path) / META if Path(path).is_dir() else Path(path)
    return torch.load(file, map_location="cpu", mmap=True, weights_only=True).get(key, default)


def alias_checkpoint(path: str | Path, name: str) -> Path:
    """Give a checkpoint a second name in its folder in one move, on one disk space; a former one of that name goes.

    A file, and each file of a sharded checkpoint's folder, gets a hard link (a copy where the file system has none),
    so it stays when the first name is removed.
    """
    source = Path(path)
    alias = source.with_name(name)
    if source.is_dir():
        temporary = _temporary(alias)
        link_folder(source, temporary)
        replace_folder(temporary, alias)
    elif not (alias.exists() and alias.samefile(source)):
        _replace(alias, lambda temporary: _link_or_copy(source, temporary))
    return alias


def remove_temporaries(folder: str | Path) -> None:
    """Remove what a killed process left half written; what it was about to replace keeps its name."""
    restore_former(folder)
    for leftover in Path(folder).glob("*.ckpt.tmp-*"):
        if leftover.is_dir():
            shutil.rmtree(leftover)
        else:
            leftover.unlink(missing_ok=True)


def _replace(target: Path, write: Callable[[Path], object]) -> None:
    temporary = _temporary(target)
    try:
        write(temporary)
        if temporary.stat().st_nlink == 1:  # a further name's bytes are on the disk already
            flush_to_disk(temporary)
        if target.is_dir():  # a sharded checkpoint of this name, from before
            replace_folder(temporary, target)
        else:
            temporary.replace(target)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def _temporary(target: Path) -> Path:
    return target.with_name(f"{target.name}.tmp-{os.getpid()}")


def _link_or_copy(source: Path, target: Path) -> None:
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)


def _is_alias(path: Path) -> bool:
    return "=" not in path.name


def _global_step(path: Path) -> int | None:
    """The number of optimizer steps in a checkpoint; None if it is not complete."""
    file = path / META if path.is_dir() else path
    # A zip archive's table of contents is its end, so a file that was cut off is none.
    if file.is_file() and zipfile.is_zipfile(file):
        try:
            step = torch.load(file, map_location="cpu", mmap=True, weights_only=True)["global_step"]
        except (OSError, RuntimeError, EOFError, KeyError, TypeError, pickle.UnpicklingError) as error:
            rank_zero_warn(f"{path} is passed over: it is not a readable checkpoint ({error})")
            return None
        return int(step)
    rank_zero_warn(f"{path} is passed over: it is not complete")
    return None
