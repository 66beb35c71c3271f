from __future__ import annotations

from typing import get_args, get_type_hints

from lightllm.cli import plain
from lightllm.cli.quantize_request import Request
from lightllm.compression.schemes import SchemeName
from lightllm.export import GGUFType, Layout


def test_choices_are_those_of_the_code_behind_them() -> None:
    hints = get_type_hints(Request)
    assert set(get_args(hints["scheme"])) == set(get_args(SchemeName))
    assert set(get_args(hints["format"])) < {*get_args(Layout), "gguf"}
    assert set(get_args(plain.Format)) == {*get_args(Layout), "gguf"}
    assert set(get_args(plain.GGUFType)) == set(get_args(GGUFType))
