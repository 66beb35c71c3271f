"""Text that every Python brings along: its documentation, as prose and as questions and answers."""

from __future__ import annotations

import json
import subprocess
import sys
import zlib
from collections import Counter
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

QUESTIONS = (
    "What does `{}` do in Python?",
    "Explain `{}` from Python's standard library.",
    "How would you describe `{}` in Python?",
    "What is `{}` for?",
)
"""The questions; which of them an object gets depends on its name alone."""


FEWEST = 20
"""Docstrings that a module has at least to be a class."""


@cache
def topic_rows() -> list[dict[str, Any]]:
    """Python's reference manual, a row a topic: `{"topic": …, "text": …}`; about half a megabyte of prose."""
    from pydoc_data.topics import topics

    return [{"topic": name, "text": text.strip() + "\n"} for name, text in sorted(topics.items())]


@cache
def chat_rows() -> list[dict[str, Any]]:
    """A question about each public function, class and method, answered by its docstring: `{"messages": […]}`.

    Raises:
        subprocess.CalledProcessError: This Python could not list its library.
    """
    return [
        {
            "messages": [
                {"role": "user", "content": _question(entry["name"]).format(entry["name"] + entry["signature"])},
                {"role": "assistant", "content": entry["docstring"]},
            ]
        }
        for entry in _documented()
    ]


@cache
def preference_rows() -> list[dict[str, Any]]:
    """The questions of `chat_rows`, answered rightly and wrongly: `{"prompt", "chosen", "rejected"}`.

    The wrong answer is another object's docstring; which one depends on the question, and on how many there are.
    """
    pairs = [(question["content"], answer["content"]) for question, answer in (row["messages"] for row in chat_rows())]
    rows = []
    for index, (question, answer) in enumerate(pairs):
        other = zlib.crc32(question.encode()) % (len(pairs) - 1)
        rejected = pairs[other + (other >= index)][1]
        rows.append({"prompt": question, "chosen": answer, "rejected": rejected})
    return rows


@cache
def class_rows() -> list[dict[str, Any]]:
    """Docstrings and the top-level modules that they are from, of modules that have 20 or more: `{"text", "label"}`.

    Raises:
        subprocess.CalledProcessError: This Python could not list its library.
    """
    from lightllm.datamodules.pydoc_walk import MODULES

    modules = {name.split(".")[0] for name in MODULES.split()}
    tops = [entry["name"].split(".")[0] for entry in _documented()]
    labels = [top if top in modules else "builtins" for top in tops]
    counts = Counter(labels)
    rows = zip(_documented(), labels, strict=True)
    return [{"text": entry["docstring"], "label": label} for entry, label in rows if counts[label] >= FEWEST]


PYDOC_SOURCES: dict[str, Callable[[], list[dict[str, Any]]]] = {
    "pydoc-chat": chat_rows,
    "pydoc-classes": class_rows,
    "pydoc-preference": preference_rows,
    "pydoc-topics": topic_rows,
}
"""The built-in sources by name: they need no file and no network."""


@cache
def _documented() -> list[dict[str, str]]:
    """Each public object with its name, signature and docstring, as the walk lists them."""
    walk = Path(__file__).with_name("pydoc_walk.py")
    # A bare interpreter (-I -S), because imported libraries patch the one that they are in.
    listing = subprocess.run([sys.executable, "-I", "-S", str(walk)], stdout=subprocess.PIPE, check=True).stdout  # noqa: S603
    entries: list[dict[str, str]] = json.loads(listing)
    return entries


def _question(name: str) -> str:
    return QUESTIONS[zlib.crc32(name.encode()) % len(QUESTIONS)]
