"""What the verb plan can be asked for."""

from __future__ import annotations

from dataclasses import fields

from lightllm.cli.plan import HELP
from lightllm.cli.plan_request import Request


def test_every_option_is_in_the_help() -> None:
    assert all(f"--{one.name} " in HELP for one in fields(Request))
