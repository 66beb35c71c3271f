"""The package's source files, parsed once, for the tests that read code."""

from __future__ import annotations

import ast
from functools import cache
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[2]


class Source(NamedTuple):
    """One file of the package."""

    path: Path
    module: str
    """Its name within the package: `models.load`, `callbacks` for `callbacks/__init__.py`."""
    text: str
    tree: ast.Module


@cache
def sources() -> dict[str, Source]:
    """Every source file by its module name; the symlinked folders are read where they really are."""
    found = {}
    for folder, package in (("lightllm", ()), ("callbacks", ("callbacks",)), ("datamodules", ("datamodules",))):
        for path in sorted((ROOT / folder).rglob("*.py")):
            inside = path.relative_to(ROOT / folder)
            if folder == "lightllm" and inside.parts[0] in ("callbacks", "datamodules"):
                continue
            parts = (*package, *inside.with_suffix("").parts)
            name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
            text = path.read_text(encoding="utf-8")
            found[name] = Source(path, name, text, ast.parse(text))
    return found


def relative(path: Path) -> str:
    """Shorten a path for messages."""
    return path.relative_to(ROOT).as_posix()
