from __future__ import annotations

from typing import Literal

import pytest
from jsonargparse import ArgumentParser

from lightllm.cli.arguments import parse
from lightllm.cli.quiet import quiet_libraries

USAGE = "MODEL [--bits 4 | 8]"


@pytest.fixture(autouse=True)
def quiet() -> None:
    """As the command does before it parses."""
    quiet_libraries()


def shrink(model: str, bits: Literal[4, 8] = 8, quietly: bool = False) -> int:
    """Make a model small.

    Args:
        model: Its path.
        bits: Of a weight.
        quietly: Say nothing.
    """
    return len(model) + bits + quietly


def test_parameters_are_arguments() -> None:
    assert parse("shrink-it", shrink, USAGE, ["a/b"]) == {"model": "a/b", "bits": 8, "quietly": False}
    assert parse("shrink-it", shrink, USAGE, ["a/b", "--bits", "4", "--quietly", "true"])["bits"] == 4


def test_what_is_declared_stands_in_for_a_parameter() -> None:
    def declare(parser: ArgumentParser) -> None:
        parser.add_argument("--quietly", action="store_true")

    assert parse("shrink-it", shrink, USAGE, ["a/b", "--quietly"], declare)["quietly"] is True
    assert parse("shrink-it", shrink, USAGE, ["a/b"], declare)["quietly"] is False


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        ([], "model is missing\nusage: lightllm shrink-it MODEL [--bits 4 | 8]"),
        (["a", "--bits", "5"], "bits: expected"),
        (["a", "--bitts", "4"], "did you mean '--bits'?"),
        (["a", "--quiet", "true"], "there is no option --quiet"),
    ],
)
def test_mistakes_are_told(arguments: list[str], told: str) -> None:
    with pytest.raises(ValueError, match=r"\n?usage") as refused:
        parse("shrink-it", shrink, USAGE, arguments)
    assert told in str(refused.value)


def test_help_says_what_the_verb_does(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parse("shrink-it", shrink, USAGE, ["--help"])
    told = capsys.readouterr().out
    assert told.startswith("usage: lightllm shrink-it MODEL")
    assert "Make a model small." in told
    assert "Of a weight." in told
