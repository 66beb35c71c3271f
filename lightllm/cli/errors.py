"""What the user reads when something is wrong: a message that says what to do, and a traceback only for faults."""

from __future__ import annotations

import re
import sys
import sysconfig
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path

PACKAGE = Path(__file__).resolve().parent.parent
OWN = (PACKAGE, PACKAGE.parent / "callbacks", PACKAGE.parent / "datamodules")
"""Folders of this project's code; in a source tree two of them are reached by links."""


def run_explained(program: str, verb: Callable[[], int]) -> int:
    """Run `verb`; a refusal ends it with its message alone: status 2 for wrong input, 1 for a run that had to stop.

    A refusal is a `ValueError` that this package or Lightning raised, or an exception of this package's own. Whatever
    else is raised is a fault, here or in a user's class, and keeps its traceback.
    """
    try:
        return verb()
    except Exception as error:
        message = refusal(error)
        if message is None:
            raise
        print(f"{program}: {message}", file=sys.stderr)
        return 2 if isinstance(error, ValueError) or _is_misconfiguration(error) else 1


def refusal(error: BaseException) -> str | None:
    """What a refusal says; None if the error is none.

    A refusal may have come up in a worker process, or have been wrapped by the parser that was making a part.
    """
    if _raised_in(error) == "jsonargparse" and error.__cause__ is not None:
        return refusal(error.__cause__)
    if _is_misconfiguration(error):
        return str(error)
    files = list(_files(error))
    if not files or any(_is_foreign(file) for file in files):
        return None  # a user's own code took part, and its author wants to know where
    if isinstance(error, ValueError):
        last = files[-1]
        if _is_own(last) or "lightning" in last.parts:
            return _message_of_worker(error) or str(error)
        return None
    return str(error) if type(error).__module__.startswith("lightllm.") else None


_WORKER = re.compile(r"Caught \w+ in \w+ worker process \d+\.\nOriginal (Traceback .*)", re.DOTALL)
_FILE = re.compile(r'^ +File "([^"]+)", line \d+', re.MULTILINE)


def _files(error: BaseException) -> Iterator[Path]:
    """The files through which an error went, to the one that raised it, which may be in another process."""
    for frame in traceback.extract_tb(error.__traceback__):
        if frame.filename != __file__:
            yield Path(frame.filename).resolve()
    remote = _WORKER.match(str(error))
    text = remote[1] if remote else str(error.__cause__) if type(error.__cause__).__name__.endswith("Traceback") else ""
    for name in _FILE.findall(text):
        yield Path(name).resolve()


def _message_of_worker(error: BaseException) -> str | None:
    """The last message of the traceback that a data loader's worker sent as its message."""
    remote = _WORKER.match(str(error))
    if remote is None:
        return None
    after_frames = remote[1][[match.end() for match in _FILE.finditer(remote[1])][-1] :]
    message = re.search(r"^[\w.]+: (.*)", after_frames, re.DOTALL | re.MULTILINE)
    return message[1].strip() if message else None


def _raised_in(error: BaseException) -> str:
    """The name of the package that raised an error."""
    files = list(_files(error))
    return files[-1].parent.name if files else ""


def _is_own(file: Path) -> bool:
    return any(folder in file.parents for folder in OWN)


_LIBRARIES = tuple(
    Path(sysconfig.get_paths()[name]).resolve() for name in ("stdlib", "platstdlib", "purelib", "platlib")
)


def _is_foreign(file: Path) -> bool:
    """Whether a file is a user's: neither this project's, nor Python's, nor an installed package's."""
    made_up = file.name.startswith("<")  # of generated code: `<string>` is a dataclass's constructor
    return not (made_up or _is_own(file) or any(folder in file.parents for folder in _LIBRARIES))


def _is_misconfiguration(error: BaseException) -> bool:
    return type(error).__name__ == "MisconfigurationException"  # Lightning's; by name, for it may not be imported
