from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

import pytest

from lightllm.datamodules import pydoc_walk
from lightllm.datamodules.pydoc_walk import MAX_DOCSTRING, MAX_SIGNATURE


@pytest.fixture(scope="module")
def entries() -> list[dict[str, str]]:
    command = [sys.executable, "-I", "-S", pydoc_walk.__file__]
    result: list[dict[str, str]] = json.loads(subprocess.run(command, stdout=subprocess.PIPE, check=True).stdout)
    return result


def test_entries_name_public_objects_of_the_standard_library(entries: list[dict[str, str]]) -> None:
    by_name = {entry["name"]: entry for entry in entries}
    assert by_name["os.path.join"]["signature"] == "(a, *p)"
    assert "str.split" in by_name
    assert not [name for name in by_name if any(part.startswith("_") for part in name.split("."))]
    roots = {name.split(".")[0] for name in by_name}
    assert {"decimal", "asyncio", "json"} <= roots
    assert len(by_name) == len(entries)


def test_entries_are_of_handy_length_and_free_of_addresses(entries: list[dict[str, str]]) -> None:
    for entry in entries:
        assert 20 <= len(entry["docstring"]) <= MAX_DOCSTRING
        assert len(entry["signature"]) <= MAX_SIGNATURE
        assert " at 0x" not in entry["docstring"] + entry["signature"]


def test_what_has_no_docstring_or_signature() -> None:
    def undocumented(value: Any = object()) -> None: ...  # noqa: B008

    def documented() -> None: ...

    documented.__doc__ = "First paragraph.\n\n" + "Second paragraph. " * 100
    assert pydoc_walk._docstring(undocumented) is None
    assert pydoc_walk._docstring(documented) is None  # too short once it is cut
    assert pydoc_walk._signature(undocumented) == "(value: 'Any' = <object object>) -> 'None'"
    assert pydoc_walk._signature(3) == ""
