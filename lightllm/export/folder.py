"""A folder that appears whole or not at all."""

from __future__ import annotations

import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from lightllm.export.report import MARKER


@contextmanager
def written_whole(folder: Path) -> Iterator[Path]:
    """Give an empty folder to write into, which takes `folder`'s place at the end; after an error, nothing changes.

    Args:
        folder: Where it is to be: a new name, an empty folder, or an earlier export.

    Raises:
        ValueError: Something else is there.
    """
    if folder.exists() and not (folder / MARKER).is_file() and not (folder.is_dir() and not any(folder.iterdir())):
        raise ValueError(f"{str(folder)!r} is there and is no earlier export: name a new folder, or remove it")
    folder.parent.mkdir(parents=True, exist_ok=True)
    token = uuid.uuid4().hex[:8]
    unfinished, replaced = (folder.with_name(f".{folder.name}-{token}-{state}") for state in ("unfinished", "replaced"))
    unfinished.mkdir()
    try:
        yield unfinished
        if folder.exists():
            folder.rename(replaced)
        unfinished.rename(folder)
    except BaseException:
        if replaced.exists() and not folder.exists():
            replaced.rename(folder)
        raise
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
        shutil.rmtree(replaced, ignore_errors=True)
