"""A checkpoint as a folder, into which every rank writes its parts and from which any number of ranks reads theirs.

The tensors of weights and optimizers are in the files of torch's distributed checkpoint, under the names that they have
in a checkpoint of one file; everything else is in `meta.pt`, which is written last. What is read runs no code: tensors
and plain values only, and of the table of contents, which is a pickle, the classes that torch writes.
"""

from __future__ import annotations

import io
import os
import pickle
import shutil
import warnings
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.filesystem import FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta, TensorStorageMetadata
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save
from typing_extensions import override

META = "meta.pt"
"""The file of everything that is no tensor of weights or optimizers; the last to be written."""

FORMER = ".tmp-former"
"""What is added to the name of a checkpoint while another takes its place."""

Template = Callable[[str, torch.Size], Tensor | None]
"""What a tensor of a name and shape is read into: one of whose layout a rank reads its part, or None for all of it."""


def write_sharded(checkpoint: dict[str, Any], path: Path, barrier: Callable[[], None]) -> None:
    """Write a checkpoint of which every rank has its parts; a crash at any moment leaves the old one or the new.

    Args:
        checkpoint: As Lightning makes it; every rank's own.
        path: The folder.
        barrier: Waits for all ranks.
    """
    first = torch.distributed.get_rank() == 0
    temporary = path.with_name(f"{path.name}.tmp-parts")
    if first:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
    barrier()
    tensors, rest = _apart(checkpoint)
    save(tensors, storage_writer=FileSystemWriter(temporary))
    if first:
        torch.save(rest, temporary / META)
        flush_to_disk(temporary / META)
        flush_to_disk(temporary)
        replace_folder(temporary, path)
    barrier()


def read_sharded(path: Path, template: Template = lambda name, size: None, alone: bool = True) -> dict[str, Any]:
    """Read a checkpoint of `write_sharded` as one of a single file would be read.

    Args:
        path: The folder.
        template: What each tensor is read into.
        alone: Read without the other ranks; else every rank must call it.

    Raises:
        ValueError: The folder holds something else.
    """
    if not (path / META).is_file():
        raise ValueError(f"{str(path)!r} is no complete checkpoint: it has no {META}")
    reader = _PlainReader(path)
    entries = reader.read_metadata().state_dict_metadata
    tensors: dict[str, Tensor] = {}
    for name, entry in entries.items():
        if not isinstance(entry, TensorStorageMetadata):
            raise ValueError(f"{str(path)!r} holds {name!r}, which is no tensor: it was not written by lightllm")
        target = template(name, entry.size)
        tensors[name] = torch.empty(entry.size, dtype=entry.properties.dtype) if target is None else target
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is disabled")  # which is what `alone` says
        load(tensors, storage_reader=reader, no_dist=alone)
    rest = torch.load(path / META, map_location="cpu", weights_only=True)
    return _together(tensors, rest)


def replace_folder(temporary: Path, path: Path) -> None:
    """Put a finished folder in the place of what has the name now, or a finished file in that of a folder.

    A crash in between leaves what had the name as `*.tmp-former`: `restore_former` gives it its name again.
    """
    former = path.with_name(f"{path.name}{FORMER}")
    _remove(former)
    if path.is_symlink() or path.exists():
        path.rename(former)
    temporary.rename(path)
    flush_to_disk(path.parent)
    _remove(former)


def restore_former(folder: str | Path) -> None:
    """Give what was about to be replaced its name again, where a crash came before the new one had it.

    Only while no process writes there, and before what to go on from is chosen. Several ranks may call it at once.
    """
    for former in Path(folder).glob(f"*{FORMER}"):
        path = former.with_name(former.name.removesuffix(FORMER))
        if not path.exists():
            with suppress(FileNotFoundError):  # another rank did it
                former.rename(path)
            flush_to_disk(path.parent)


def flush_to_disk(path: Path) -> None:
    """Wait until a file's bytes, or a folder's names, would survive a power cut."""
    if path.is_dir() and os.name == "nt":
        return  # Windows opens no folders
    descriptor = os.open(path, os.O_RDONLY if os.name != "nt" else os.O_RDWR)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _remove(path: Path) -> None:
    """Remove a file or a folder, or nothing."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def link_folder(source: Path, target: Path) -> None:
    """Make a folder of hard links to another's files, or of copies where the file system has no links."""
    target.mkdir()
    for file in source.iterdir():
        try:
            os.link(file, target / file.name)
        except OSError:
            shutil.copyfile(file, target / file.name)


def _apart(checkpoint: dict[str, Any]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors of weights and optimizers by dotted names, and all the rest."""
    tensors = {f"state_dict.{name}": value for name, value in checkpoint["state_dict"].items()}
    states = []
    for number, state in enumerate(checkpoint.get("optimizer_states", [])):
        values: dict[Any, dict[str, Any]] = {}
        for index, of_parameter in state["state"].items():
            values[index] = {key: value for key, value in of_parameter.items() if not isinstance(value, Tensor)}
            prefix = f"optimizer_states.{number}.{index}"
            tensors |= {f"{prefix}.{key}": value for key, value in of_parameter.items() if isinstance(value, Tensor)}
        states.append({**state, "state": values})
    rest = {key: value for key, value in checkpoint.items() if key != "state_dict"}
    return tensors, rest | ({"optimizer_states": states} if states else {})


def _together(tensors: dict[str, Tensor], rest: dict[str, Any]) -> dict[str, Any]:
    """The checkpoint that `_apart` took apart."""
    checkpoint = {**rest, "state_dict": {}}
    for name, value in tensors.items():
        kind, _, within = name.partition(".")
        if kind == "state_dict":
            checkpoint["state_dict"][within] = value
        else:
            number, index, key = within.split(".", 2)
            checkpoint["optimizer_states"][int(number)]["state"].setdefault(int(index), {})[key] = value
    return checkpoint


class _PlainReader(FileSystemReader):
    """Reads the table of contents without running code that somebody put there."""

    @override
    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        content = (Path(self.path) / ".metadata").read_bytes()
        metadata = _PlainUnpickler(io.BytesIO(content)).load()
        assert isinstance(metadata, Metadata)
        if metadata.storage_meta is None:
            metadata.storage_meta = StorageMeta()
        metadata.storage_meta.load_id = self.load_id
        return metadata


class _PlainUnpickler(pickle.Unpickler):
    """Knows the classes of which torch's table of contents is made, and functions that make nothing else.

    Each by its whole name: a name with dots would lead from a known module to whatever that one has imported.
    """

    @override
    def find_class(self, module: str, name: str) -> Any:
        dtype = module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)
        if dtype or (module, name) in _KNOWN:
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"the checkpoint's table of contents has a {module}.{name}: it is not from torch")


_METADATA = "torch.distributed.checkpoint.metadata"
_KNOWN = {
    (_METADATA, "BytesStorageMetadata"),
    (_METADATA, "ChunkStorageMetadata"),
    (_METADATA, "Metadata"),
    (_METADATA, "MetadataIndex"),
    (_METADATA, "StorageMeta"),
    (_METADATA, "TensorProperties"),
    (_METADATA, "TensorStorageMetadata"),
    (_METADATA, "_MEM_FORMAT_ENCODING"),
    ("torch.distributed.checkpoint.filesystem", "_StorageInfo"),
    ("collections", "OrderedDict"),
    ("pathlib", "PosixPath"),
    ("pathlib", "WindowsPath"),
    ("pathlib._local", "PosixPath"),  # their names in Python 3.13
    ("pathlib._local", "WindowsPath"),
    ("torch", "Size"),
    ("torch.serialization", "_get_layout"),
}
