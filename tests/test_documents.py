"""What the documents say is tested, is."""

from __future__ import annotations

import re

import yaml
from source_tree import ROOT


def test_the_tests_that_the_table_of_strategies_names_are_there() -> None:
    text = (ROOT / "docs" / "parallelism.md").read_text(encoding="utf-8")
    named = set(re.findall(r"`(test_\w+\.py)::(test_\w+)`", text))
    assert len(named) > 10
    for file, function in named:
        texts = [path.read_text(encoding="utf-8") for path in (ROOT / "tests").rglob(file)]
        assert any(f"def {function}(" in text for text in texts), f"{file} has no {function}"


def test_the_overlays_that_it_names_are_there() -> None:
    text = (ROOT / "docs" / "parallelism.md").read_text(encoding="utf-8")
    for name, strategy in re.findall(r"\| `((?:parallel|trainer)/\w+\.yaml)` \| (.*?) \|", text):
        content = yaml.safe_load((ROOT / "configs" / name).read_text())["trainer"]["strategy"]
        arguments = {} if isinstance(content, str) else content.get("init_args", {})
        written = ", ".join(f"{key}={value}" for key, value in arguments.items())
        assert ("ddp" if content == "ddp" else f"ParallelStrategy({written})") in strategy
        assert written in strategy
