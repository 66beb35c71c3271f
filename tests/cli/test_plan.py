"""The arguments of the verb plan."""

from __future__ import annotations

import subprocess
import sys
import time

import pytest
from command_line import refused

from lightllm.cli.plan import read_request
from lightllm.cli.plan_request import Request


def test_its_own_options_are_taken_and_the_others_are_the_configurations() -> None:
    request, rest = read_request(["--config", "a.yaml", "--hardware", "h100-8", "--data.max_length", "4", "--top", "3"])
    assert request == Request("h100-8", False, None, None, None, 3)
    assert rest == ["--config", "a.yaml", "--data.max_length", "4"]


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ([], "name the machine"),
        (["--here", "--hardware", "h100-8"], "and not both"),
        (["--here", "--top", "0"], "top is 0"),
        (["--here", "--target_batch_tokens", "many"], "invalid int value: 'many'"),
    ],
)
def test_what_makes_no_sense_is_refused(arguments: list[str], says: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert says in refused(capsys, "plan", *arguments)


def test_help_is_quick_and_imports_nothing_heavy() -> None:
    code = (
        "import sys; from lightllm.cli import main; main(['plan', '--help']); "
        "print(*{'torch', 'lightning', 'transformers', 'peft'} & set(sys.modules))"
    )
    begin = time.perf_counter()
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "--hardware MACHINE" in result.stdout
    assert result.stdout.splitlines()[-1] == ""
    assert time.perf_counter() - begin < 5  # well within a second on a machine that does nothing else
