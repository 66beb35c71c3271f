"""The cache: folders that are made once, named by a digest of all that went into them."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

from filelock import FileLock


def cached_folder(root: Path, kind: str, key: str, fill: Callable[[Path], None]) -> Path:
    """A folder of the cache, made now if it is not there.

    It is filled under another name and then renamed, so that a folder that exists is whole, whenever a process may
    have been killed. Of several processes that need it at once, one makes it and the others wait.

    Args:
        root: Folder of the cache.
        kind: What the folder holds; its parent's name.
        key: Digest of everything that the content depends on.
        fill: Writes the content into the (empty) folder that it is given.
    """
    folder = root / kind / key
    if folder.is_dir():
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{folder}.lock"):
        if folder.is_dir():  # made while we waited
            return folder
        for left_behind in folder.parent.glob(f".{key}-*"):
            shutil.rmtree(left_behind)
        unfinished = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{key}-"))
        try:
            fill(unfinished)
            os.replace(unfinished, folder)
        finally:
            shutil.rmtree(unfinished, ignore_errors=True)
    return folder
