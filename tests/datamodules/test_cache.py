from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from lightllm.datamodules import cache
from lightllm.datamodules.cache import cached_folder


def test_a_folder_is_made_once(tmp_path: Path) -> None:
    calls = []

    def fill(folder: Path) -> None:
        calls.append(folder)
        (folder / "file").write_text("content")

    first = cached_folder(tmp_path / "cache", "things", "key", fill)
    assert cached_folder(tmp_path / "cache", "things", "key", fill) == first == tmp_path / "cache/things/key"
    assert (first / "file").read_text() == "content"
    assert len(calls) == 1
    assert calls[0] != first
    assert cached_folder(tmp_path / "cache", "things", "other", fill) != first
    assert len(calls) == 2


def test_what_fails_or_was_killed_leaves_nothing(tmp_path: Path) -> None:
    def fail(folder: Path) -> None:
        (folder / "half").touch()
        raise RuntimeError("disk full")

    with pytest.raises(RuntimeError, match="disk full"):
        cached_folder(tmp_path, "things", "key", fail)
    assert [path.name for path in (tmp_path / "things").iterdir()] == ["key.lock"]
    killed = tmp_path / "things" / ".key-killed"
    killed.mkdir()
    (killed / "half").touch()
    folder = cached_folder(tmp_path, "things", "key", lambda folder: (folder / "whole").touch())
    assert [path.name for path in folder.iterdir()] == ["whole"]
    assert not killed.exists()


PROCESS = """
import runpy, sys, time
from pathlib import Path

cached_folder = runpy.run_path(sys.argv[3])["cached_folder"]  # alone: its package takes seconds to import

def fill(folder):
    with open(sys.argv[2], "a") as log:
        log.write("filled\\n")
    for part in range(20):
        (folder / str(part)).touch()
        time.sleep(0.02)

folder = cached_folder(Path(sys.argv[1]), "things", "key", fill)
print(len(list(folder.iterdir())))
"""


def test_processes_that_start_together_make_it_once(tmp_path: Path) -> None:
    command = [sys.executable, "-c", PROCESS, str(tmp_path / "cache"), str(tmp_path / "log"), cache.__file__]
    processes = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    outputs = [process.communicate(timeout=60)[0] for process in processes]
    assert outputs == ["20\n", "20\n"]
    assert (tmp_path / "log").read_text() == "filled\n"
