"""Sources: what the fields `train`, `val` and `test` can name, and the rows behind each."""

from __future__ import annotations

import glob
import hashlib
import json
import re
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import TYPE_CHECKING, cast

from typing_extensions import override

from lightllm.datamodules.files import FILE_READERS, START, Cursor, RowReader
from lightllm.datamodules.pydoc_rows import PYDOC_SOURCES
from lightllm.datamodules.rows import Origin, Row

if TYPE_CHECKING:
    from datasets import Dataset, IterableDataset

SUFFIXES = (*FILE_READERS, ".parquet")
"""Files that can be read."""

_HUB_ID = re.compile(r"(?P<name>[\w.-]+/[\w.-]+)(:(?P<config>[\w.-]+))?(#(?P<split>[\w\[\]:%+.-]+))?")

_HUB_SPLITS = {"train": ("train",), "val": ("validation", "val", "valid", "dev"), "test": ("test",)}


class Source(ABC):
    """Rows that can be read again, in the same order."""

    name: str
    """What its rows' origins say."""

    @abstractmethod
    def rows(self, start: Cursor = START) -> RowReader:
        """Rows from a place on, each with the place behind it."""

    @abstractmethod
    def digest(self) -> str:
        """A digest of the content: equal digests mean equal rows."""

    @abstractmethod
    def num_bytes(self) -> int | None:
        """The content's size, if it is known."""


@dataclass
class FileSource(Source):
    """A file."""

    name: str

    @override
    def rows(self, start: Cursor = START) -> RowReader:
        path = Path(self.name)
        if path.suffix.lower() == ".parquet":
            return _table_rows(_parquet(path), self.name, start)
        return FILE_READERS[path.suffix.lower()](path, start)

    @override
    def digest(self) -> str:
        digest = hashlib.sha256(Path(self.name).suffix.lower().encode())
        with Path(self.name).open("rb") as file:
            while block := file.read(1 << 20):
                digest.update(block)
        return digest.hexdigest()

    @override
    def num_bytes(self) -> int | None:
        return Path(self.name).stat().st_size


@dataclass
class HubSource(Source):
    """A data set of the Hugging Face hub, `owner/name:config#split`; downloaded, or streamed."""

    name: str
    split: str
    streaming: bool

    @override
    def rows(self, start: Cursor = START) -> RowReader:
        return _table_rows(self._table(), self.name, start)

    @override
    def digest(self) -> str:
        return cast(str, self._table()._fingerprint)

    @override
    def num_bytes(self) -> int | None:
        return None

    def _table(self) -> Dataset | IterableDataset:
        import datasets  # takes a second, and files need it not

        match = _HUB_ID.fullmatch(self.name)
        assert match is not None
        name, config, split = match["name"], match["config"], match["split"]
        try:
            if split is None:
                known = datasets.get_dataset_split_names(name, config)
                split = next((one for one in _HUB_SPLITS[self.split] if one in known), None)
                if split is None:
                    raise ValueError(f"{name} has no split for {self.split}: write {self.name}#SPLIT, one of {known}")
            return datasets.load_dataset(name, config, split=split, streaming=self.streaming)
        except OSError as error:  # no such data set, or no connection
            raise ValueError(f"data.{self.split}: {name} is no file, and can't be had from the hub: {error}") from error


@dataclass
class PydocSource(Source):
    """What the installed Python says of itself; see `pydoc_rows`."""

    name: str

    @override
    def rows(self, start: Cursor = START) -> RowReader:
        for index, values in enumerate(PYDOC_SOURCES[self.name]()):
            if index >= start.offset:
                yield Row(values, Origin(self.name, index + 1)), Cursor(index + 1, index + 2)

    @override
    def digest(self) -> str:
        return hashlib.sha256(json.dumps(PYDOC_SOURCES[self.name]()).encode()).hexdigest()

    @override
    def num_bytes(self) -> int | None:
        return len(json.dumps(PYDOC_SOURCES[self.name]()))


def find_sources(names: str | Sequence[str], split: str, streaming: bool = False) -> list[Source]:
    """The sources that a field names, in a fixed order.

    Args:
        names: Files, folders (every readable file below), globs, hub ids or built-in names.
        split: "train", "val" or "test"; tells the split of a hub id that names none.
        streaming: Hub ids are streamed instead of downloaded.

    Raises:
        ValueError: A name leads nowhere, or to files that can't be read.
    """
    names = [names] if isinstance(names, str) else list(names)
    found = [source for name in names for source in _find(name, split, streaming)]
    if not found:
        raise ValueError(f"no data: set data.{split} to a file, folder, glob, hub id or one of {list(PYDOC_SOURCES)}")
    return found


def _find(name: str, split: str, streaming: bool) -> list[Source]:
    path = Path(name).expanduser()
    if name in PYDOC_SOURCES:
        return [PydocSource(name)]
    if path.is_dir():
        files = sorted(file for file in path.rglob("*") if file.is_file() and file.suffix.lower() in SUFFIXES)
        if not files:
            raise ValueError(f"the folder {name} holds no file that can be read ({', '.join(SUFFIXES)})")
        return [FileSource(str(file)) for file in files]
    if path.is_file():
        return [_file_source(path)]
    if glob.has_magic(name) and not _HUB_ID.fullmatch(name):
        files = sorted(Path(match) for match in glob.glob(str(path), recursive=True) if Path(match).is_file())
        if not files:
            raise ValueError(f"no file matches {name}")
        return [_file_source(file) for file in files]
    if _HUB_ID.fullmatch(name) and path.suffix.lower() not in SUFFIXES:
        return [HubSource(name, split, streaming)]
    near = get_close_matches(path.name, [*(file.name for file in path.parent.glob("*")), *PYDOC_SOURCES], n=1)
    hint = f" (did you mean {near[0]}?)" if near else f"; built-in sources are {', '.join(PYDOC_SOURCES)}"
    raise ValueError(f"data.{split}: no such file or folder: {name}{hint}")


def _file_source(path: Path) -> FileSource:
    if path.suffix.lower() not in SUFFIXES:
        raise ValueError(f"can't read {path}: files end in {', '.join(SUFFIXES)}")
    return FileSource(str(path))


def _parquet(path: Path) -> IterableDataset:
    import datasets  # takes a second, and other files need it not

    return datasets.load_dataset("parquet", data_files=str(path), split="train", streaming=True)


def _table_rows(table: Dataset | IterableDataset, name: str, start: Cursor) -> RowReader:
    for index, values in enumerate(table.skip(start.offset), start.offset):
        yield Row(values, Origin(name, index + 1)), Cursor(index + 1, index + 2)
