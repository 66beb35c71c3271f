"""What the user reads when something is wrong: one line that says what to do, and a traceback only for faults."""

from __future__ import annotations

import inspect
import re
import sys
import traceback
from collections.abc import Callable
from difflib import get_close_matches
from importlib import import_module
from pathlib import Path

PACKAGE = Path(__file__).resolve().parent.parent


def run_explained(program: str, verb: Callable[[], int]) -> int:
    """Run `verb`; a refusal of lightllm's own ends it with its message alone and status 2.

    A `ValueError` that was raised by this package says what is wrong with the input. Any other exception is a fault,
    here or in a user's class, and keeps its traceback.
    """
    try:
        return verb()
    except ValueError as error:
        raised_in = Path(traceback.extract_tb(error.__traceback__)[-1].filename).resolve()
        own = (PACKAGE, PACKAGE.parent / "callbacks", PACKAGE.parent / "datamodules")
        if not any(folder in raised_in.parents for folder in own):
            raise
        print(f"{program}: {error}", file=sys.stderr)
        return 2


def nearest_spelling(message: str) -> str:
    """A parser's message without its inner workings, and with the nearest right spelling of what it does not know."""
    lines = [line for line in message.splitlines() if line.strip() and not _NOISE.search(line)]
    unknown = [name for pattern in _UNKNOWN for name in re.findall(pattern, message)]
    hints = []
    for name in dict.fromkeys(unknown):
        leaf = name.rsplit(".", 1)[-1]
        near = get_close_matches(leaf, _known_names() - {leaf}, n=1, cutoff=0.6)
        if near:
            hints.append(f"{leaf!r}: did you mean {near[0]!r}?")
    return "\n".join([*lines, *hints])


_NOISE = re.compile(
    r"^\s*(Given value|Subtypes:|Errors:|- Expected a <class 'NoneType'>|Does not validate against any of the Union)"
)

_UNKNOWN = (
    r"Option '([^']+)' is not accepted",
    r"Expected a dot import path string: (\S+)",
    r"Key '([^']+)' is not expected",
    r"class with name \"?'?(\w+)",
    r"[Uu]nrecognized arguments: --([\w.]+)",
    r"no attribute '(\w+)'",
)


def _known_names() -> set[str]:
    """Every class that a configuration may name, and every field that one of them has."""
    packages = ("lightllm.modules", "lightllm.models", "lightllm.datamodules", "lightllm.callbacks")
    classes: list[type] = [import_module("lightning.pytorch").Trainer]
    for package in packages:
        module = import_module(package)
        classes += [vars(module)[name] for name in module.__all__ if isinstance(vars(module)[name], type)]
    names = {"trainer", "model", "data", "run", "log", "checkpoint", "throughput", "seed_everything"}
    for one in classes:
        names.add(one.__name__)
        for parent in one.__mro__[:-1]:
            names |= set(inspect.signature(parent.__init__).parameters)
    return names - {"self", "args", "kwargs", "common"}
