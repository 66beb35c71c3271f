from __future__ import annotations

from typing import Any

import pytest
from command_line import refused

from lightllm.cli.arguments import parse
from lightllm.cli.quantize import USAGE
from lightllm.cli.quantize_request import Request
from lightllm.cli.quiet import quiet_libraries


def test_options_are_the_requests_fields() -> None:
    quiet_libraries()
    assert Request(**parse("quantize", Request, USAGE, ["a"])) == Request("a")
    given = ["a", "--scheme", "int8_weight_only", "--leave_out", '["x", "y"]', "--group_size", "16"]
    expected = Request("a", scheme="int8_weight_only", leave_out=("x", "y"), group_size=16)
    assert Request(**parse("quantize", Request, USAGE, given)) == expected


def test_what_is_not_known_is_refused(capsys: pytest.CaptureFixture[str], material: Any) -> None:
    assert "int4_weight_only" in refused(capsys, "quantize", "x", "--scheme", "int4")
    assert "--to" in refused(capsys, "quantize", material.network)
