"""What the user reads when something is wrong: a message that says what to do, and a traceback only for faults."""

from __future__ import annotations

import os
import re
import sys
import sysconfig
import traceback
from collections.abc import Callable, Iterator
from itertools import pairwise
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
    if _LOST.search(str(error)) and _is_between_ranks(error):
        return _lost_rank(error)
    if _raised_in(error) == "jsonargparse" and error.__cause__ is not None:
        return refusal(error.__cause__)
    if _is_misconfiguration(error):
        return str(error)
    if worker := _WORKER.match(str(error)):
        return _refusal_of_worker(worker[1])
    files = list(_files(error))
    if not files or any(map(_is_foreign, files)):
        return None  # a user's own code took part, and its author wants to know where
    if isinstance(error, ValueError):
        return str(error) if _is_own(files[-1]) or "lightning" in files[-1].parts else None
    return str(error) if type(error).__module__.startswith("lightllm.") else None


_LOST = re.compile(
    r"Connection (closed|reset) by (remote )?peer|Broken pipe|Connection refused|Socket closed"
    r"|onnection was likely closed|remote process exited|ncclRemoteError|Timed out waiting \d+ms"
)
"""What gloo, NCCL and torch's store say when the process at the other end is gone."""


def _lost_rank(error: BaseException) -> str:
    """What to say when another process of the run has ended, whatever ended it."""
    environment = f"rank {os.environ['RANK']}" if "RANK" in os.environ else "this rank"
    return (
        f"{environment} stops, because another rank of the run has ended or cannot be reached. What that one said is "
        "before this; nothing, if it was killed (for its memory, perhaps). The last checkpoint is whole: go on with "
        f"lightllm fit --resume RUN ({str(error).splitlines()[0]})"
    )


def _is_between_ranks(error: BaseException) -> bool:
    """Whether a lost connection can be that to another rank: pipes and loggers lose theirs too."""
    files = list(_files(error))
    if any(("torch", "distributed") in pairwise(file.parts) for file in files):
        return True
    # A collective that a hook of the backward pass calls has no frame of its own.
    return _num_ranks() > 1 and any("torch" in file.parts for file in files)


def _num_ranks() -> int:
    """The size of the process group; 1 if there is none."""
    distributed = sys.modules.get("torch.distributed")  # where it was never imported, nobody has made a group
    return distributed.get_world_size() if distributed is not None and distributed.is_initialized() else 1


_WORKER = re.compile(r"Caught \w+ in \w+ worker process \d+\.\nOriginal (Traceback .*)", re.DOTALL)
_FILE = re.compile(r'^ +File "([^"]+)", line \d+', re.MULTILINE)


def _files(error: BaseException) -> Iterator[Path]:
    """The files through which an error went, to the one that raised it, which may be in another process."""
    for frame in traceback.extract_tb(error.__traceback__):
        yield Path(frame.filename).resolve()
    if type(error.__cause__).__name__.endswith("RemoteTraceback"):
        yield from _files_in(str(error.__cause__))


def _files_in(text: str) -> list[Path]:
    """The files that the text of a traceback names."""
    return [Path(name).resolve() for name in _FILE.findall(text)]


def _refusal_of_worker(text: str) -> str | None:
    """What a data loader's worker refused, from its traceback; None if it met a fault."""
    files = _files_in(text)
    end = [match.end() for match in _FILE.finditer(text)][-1]
    raised = re.search(r"^([\w.]+): (.*)", text[end:], re.DOTALL | re.MULTILINE)
    if raised is None or any(map(_is_foreign, files)) or not _is_own(files[-1]):
        return None
    return raised[2].strip() if raised[1] == "ValueError" or raised[1].startswith("lightllm.") else None


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
