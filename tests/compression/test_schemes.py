from __future__ import annotations

from typing import get_args

import pytest
import torch
from torch import nn

from lightllm.compression.grids import Q4_0Grid, Q8_0Grid, SymmetricGrid
from lightllm.compression.schemes import SchemeName, bits_of, check_groups, make_scheme


def test_every_name_has_a_scheme_on_both_targets() -> None:
    for name in get_args(SchemeName):
        for target in ("torchao", "gguf"):
            scheme = make_scheme(name, target=target)
            assert (scheme.inputs is not None) == ("dynamic" in name)
            assert scheme.grid.bits == bits_of(name) == (4 if "int4" in name else 8)
            on_grid = scheme.grid.round_weight(torch.randn(4, 64))
            integers = scheme.grid.integers(
                scheme.grid.groups(on_grid), scheme.grid.scales(scheme.grid.groups(on_grid))
            )
            assert integers.abs().max() <= 2 ** (scheme.grid.bits - 1)


def test_grids_of_the_names() -> None:
    assert make_scheme("int8_dynamic_int4").grid == SymmetricGrid(4, 32)
    assert make_scheme("int4_weight_only", 16).grid == SymmetricGrid(4, 16)
    assert make_scheme("int8_weight_only").grid == SymmetricGrid(8, None, float32_scales=True)
    assert make_scheme("int8_weight_only", 32).grid == SymmetricGrid(8, 32, float32_scales=True)
    assert make_scheme("int4_weight_only", target="gguf").grid == Q4_0Grid()
    assert make_scheme("int8_dynamic_int8", 32, target="gguf").grid == Q8_0Grid()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("int4_weight_only", 64, "gguf"), "group_size is 64, and GGUF has groups of 32"),
        (("int4_weight_only", 1), "group_size is 1: give at least 2"),
        (("int8_dynamic_int8", 32), "int8_dynamic_int8 has one scale a row, not one for 32"),
    ],
)
def test_groups_that_there_are_not(arguments: tuple[SchemeName, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_scheme(*arguments)


def test_layers_must_fit_the_groups() -> None:
    layers = {"a": nn.Linear(64, 8), "b": nn.Linear(80, 8)}
    check_groups(make_scheme("int8_weight_only"), layers)
    with pytest.raises(
        ValueError, match=r"b has 80 inputs, which groups of 32 do not divide \(1 of 2 layers\): choose"
    ):
        check_groups(make_scheme("int4_weight_only"), layers)
    with pytest.raises(ValueError, match="take the target torchao, or name such layers in leave_out"):
        check_groups(make_scheme("int4_weight_only", target="gguf"), layers)
