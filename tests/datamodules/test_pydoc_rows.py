from __future__ import annotations

import json
import subprocess
import sys

from lightllm.datamodules import pydoc_rows
from lightllm.datamodules.pydoc_rows import PYDOC_SOURCES, QUESTIONS, chat_rows, class_rows, topic_rows


def test_questions_are_answered_by_docstrings() -> None:
    rows = chat_rows()
    assert len(rows) > 2000
    answers = {}
    for row in rows:
        user, assistant = row["messages"]
        assert (user["role"], assistant["role"]) == ("user", "assistant")
        answers[user["content"].split("`")[1].split("(")[0]] = assistant["content"]
    assert answers["math.gcd"] == "Greatest Common Divisor."
    assert answers["textwrap.dedent"].startswith("Remove any common leading whitespace")
    assert len(set(answers.values())) == len(rows), "an answer in training would give one in validation away"
    openings = {row["messages"][0]["content"].split("`")[0] for row in rows}
    assert openings == {question.split("`")[0] for question in QUESTIONS}


def test_topics_are_prose() -> None:
    rows = topic_rows()
    assert sum(len(row["text"]) for row in rows) > 400_000
    assert any(row["topic"] == "lambda" for row in rows)
    assert {"pydoc-chat", "pydoc-topics"} <= set(PYDOC_SOURCES)


def test_classes_are_modules_with_many_docstrings() -> None:
    rows = class_rows()
    labels = [row["label"] for row in rows]
    assert {"builtins", "asyncio", "os", "decimal"} <= set(labels)
    assert min(labels.count(label) for label in set(labels)) >= 20
    assert len({row["text"] for row in rows}) == len(rows) > 1000
    texts = {row["text"]: row["label"] for row in rows}
    assert texts["Greatest Common Divisor."] == "math"


def test_rows_are_the_same_in_every_process() -> None:
    # A bare one has other hashes each time, and none of the libraries that patch the standard one in this process.
    code = "import json, runpy, sys; print(json.dumps(runpy.run_path(sys.argv[1])['chat_rows']()))"
    result = subprocess.run([sys.executable, "-c", code, pydoc_rows.__file__], capture_output=True, check=True)
    assert json.loads(result.stdout) == chat_rows()
