"""What a quantized layer is: how its weight is rounded, and how its inputs are."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

from lightllm.compression.grids import Grid, Q4_0Grid, Q8_0Grid, SymmetricGrid
from lightllm.compression.token_rounding import round_asymmetric, round_blocks, round_symmetric

SchemeName = Literal["int8_dynamic_int4", "int4_weight_only", "int8_weight_only", "int8_dynamic_int8"]
"""`int8_dynamic_…`: activations are rounded to int8, token by token; the weight's bits come last."""

Target = Literal["torchao", "gguf"]
"""Whose numbers: those of torchao's tensors, or those of GGUF files (Q4_0, Q8_0) and llama.cpp."""


class Scheme(NamedTuple):
    """How a layer is quantized."""

    name: SchemeName
    target: Target
    grid: Grid
    """Of the weight."""
    inputs: Callable[[Tensor], Tensor] | None
    """From inputs `[..., in]` to rounded ones; None leaves them as they are."""

    def stored_in(self, dtype: torch.dtype) -> Scheme:
        """The scheme for a network of a dtype, in which torchao's tensors keep their scales.

        So a merged weight, which is rounded in float32, is on the grid that the network's file will have.
        """
        grid = self.grid
        if not isinstance(grid, SymmetricGrid) or grid.float32_scales or dtype == torch.float32:
            return self
        return self._replace(grid=replace(grid, scale_dtype=dtype))


def make_scheme(name: SchemeName, group_size: int | None = None, target: Target = "torchao") -> Scheme:
    """The scheme of a name.

    Args:
        name: Which.
        group_size: How many weights share a scale. None: 32 for 4-bit weights and for GGUF, whole rows for 8-bit ones.
        target: Whose numbers.

    Raises:
        ValueError: The scheme has no such groups.
    """
    if target == "gguf":
        if group_size not in (None, 32):
            raise ValueError(f"group_size is {group_size}, and GGUF has groups of 32: leave it out")
        grid: Grid = Q4_0Grid() if bits_of(name) == 4 else Q8_0Grid()
        return Scheme(name, target, grid, round_blocks if name.startswith("int8_dynamic") else None)
    if group_size is not None and group_size < 2:
        raise ValueError(f"group_size is {group_size}: give at least 2")
    if bits_of(name) == 4:
        inputs = round_asymmetric if name == "int8_dynamic_int4" else None
        return Scheme(name, target, SymmetricGrid(4, group_size or 32), inputs)
    if name == "int8_dynamic_int8" and group_size is not None:
        raise ValueError(
            f"int8_dynamic_int8 has one scale a row, not one for {group_size} weights: leave group_size out"
        )
    grid = SymmetricGrid(8, group_size, float32_scales=True)
    return Scheme(name, target, grid, round_symmetric if name == "int8_dynamic_int8" else None)


def bits_of(name: SchemeName) -> int:
    """Bits of a weight."""
    return int(name[-1]) if name[-1].isdigit() else int(name.removeprefix("int")[0])


def check_groups(scheme: Scheme, layers: dict[str, nn.Linear]) -> None:
    """Refuse layers whose rows cannot be cut into the scheme's groups.

    Args:
        scheme: How they are to be quantized.
        layers: By name.

    Raises:
        ValueError: A layer is none that fits.
    """
    size = scheme.grid.group_size
    misfits = {name: layer.in_features for name, layer in layers.items() if size and layer.in_features % size}
    if misfits:
        name, inputs = next(iter(misfits.items()))
        instead = "choose a group_size that divides it" if scheme.target == "torchao" else "take the target torchao"
        raise ValueError(
            f"{name} has {inputs} inputs, which groups of {size} do not divide ({len(misfits)} of {len(layers)} "
            f"layers): {instead}, or name such layers in leave_out"
        )
