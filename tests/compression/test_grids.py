from __future__ import annotations

import gguf
import pytest
import torch
from torch import Tensor
from torchao.quantization import IntxWeightOnlyConfig, PerGroup, PerRow
from torchao.quantization.qat import IntxFakeQuantizeConfig
from torchao.quantization.qat.fake_quantizer import IntxFakeQuantizer
from torchao.quantization.quantize_.workflows import Int8Tensor, IntxUnpackedToInt8Tensor

from lightllm.compression.grids import Grid, Q4_0Grid, Q8_0Grid, SymmetricGrid

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
GGUF: list[tuple[Grid, str]] = [(Q4_0Grid(), "Q4_0"), (Q8_0Grid(), "Q8_0")]


def weight(dtype: torch.dtype, out: int = 64, inputs: int = 96) -> Tensor:
    """Groups of very different sizes, one of zeros, one of equal values, and many ties between magnitudes."""
    values = torch.randn(out, inputs) * 10 ** torch.randn(out, 1)
    values[: out // 2] = (values[: out // 2] * 8).round() / 8
    values[0, :32] = 0
    values[1, :32] = -0.5
    values[2, :32:2], values[2, 1:32:2] = 3.0, -3.0
    return values.to(dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bits", [4, 8])
def test_symmetric_is_torchaos_fake_quantizer_and_its_tensor(bits: int, dtype: torch.dtype) -> None:
    integer = {4: torch.int4, 8: torch.int8}[bits]
    original = weight(dtype)
    fake = IntxFakeQuantizer(IntxFakeQuantizeConfig(integer, group_size=32, is_symmetric=True, scale_precision=None))
    stored = IntxUnpackedToInt8Tensor.from_hp(original, (1, 32), integer)
    grid = SymmetricGrid(bits, 32)
    rounded = grid.round_weight(original)
    assert rounded.dtype == dtype
    assert torch.equal(rounded, fake(original))
    assert torch.equal(rounded, stored.dequantize())
    groups = grid.groups(original)
    scales = grid.scales(groups)
    assert torch.equal(scales.squeeze(-1), stored.scale)
    assert torch.equal(grid.integers(groups, scales).flatten(1).to(torch.int8), stored.qdata)


@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_with_float32_scales_are_torchaos_int8_tensor(dtype: torch.dtype) -> None:
    original = weight(dtype)
    stored = Int8Tensor.from_hp(original, PerRow())
    grid = SymmetricGrid(8, float32_scales=True)
    assert torch.equal(grid.round_weight(original), stored.dequantize())
    assert torch.equal(grid.scales(original), stored.scale)


@pytest.mark.parametrize(("grid", "kind"), GGUF)
@pytest.mark.parametrize("dtype", DTYPES)
def test_ggufs_grids_are_the_packages(grid: Grid, kind: str, dtype: torch.dtype) -> None:
    original = weight(dtype)
    form = gguf.GGMLQuantizationType[kind]
    expected = gguf.quants.dequantize(gguf.quants.quantize(original.float().numpy(), form), form)
    assert torch.equal(grid.round_weight(original), torch.from_numpy(expected))


@pytest.mark.parametrize(("grid", "kind"), GGUF)
def test_what_is_on_ggufs_grid_stays(grid: Grid, kind: str) -> None:
    rounded = grid.round_weight(weight(torch.float32))
    form = gguf.GGMLQuantizationType[kind]
    again = gguf.quants.dequantize(gguf.quants.quantize(rounded.numpy(), form), form)
    assert torch.equal(torch.from_numpy(again), rounded)


@pytest.mark.parametrize("grid", [SymmetricGrid(4, 32), SymmetricGrid(8), *(grid for grid, _ in GGUF)])
def test_zeros_stay_and_no_value_moves_by_more_than_half_a_step(grid: Grid) -> None:
    original = weight(torch.float32)
    original[:, ::2] = 0
    groups = grid.groups(original)
    scales = grid.scales(groups)
    rounded = grid.round(groups, scales)
    assert (rounded[groups == 0] == 0).all()
    inside = groups.abs() < scales.abs() * 7
    moved = (rounded - groups).abs() / scales.abs().clamp(min=1e-30)
    assert moved[inside].max() <= 0.501


def test_given_scales_round_a_column_as_its_group_is() -> None:
    grid = SymmetricGrid(4, 32)
    original = weight(torch.float32)
    groups = grid.groups(original)
    scales = grid.scales(groups)
    column = grid.round(groups[:, 1, 5:6], scales[:, 1])
    assert torch.equal(column, grid.round(groups, scales)[:, 1, 5:6])
    wider = grid.round_weight(original, scales * 2)
    assert torch.equal(wider, grid.round_weight(original / 2, scales) * 2)


def test_scales_of_another_dtype_are_its_numbers() -> None:
    original = weight(torch.float32)
    grid = SymmetricGrid(4, 32, scale_dtype=torch.bfloat16)
    groups = grid.groups(original)
    scales = grid.scales(groups)
    assert scales.dtype == torch.float32
    assert torch.equal(scales, SymmetricGrid(4, 32).scales(groups).bfloat16().float())
    assert torch.equal(grid.round_weight(original), SymmetricGrid(4, 32).round_weight(original, scales))
    small = weight(torch.bfloat16)
    assert torch.equal(grid.round_weight(small), SymmetricGrid(4, 32).round_weight(small))


def test_groups_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ValueError, match=r"rows of 80 cannot be cut into groups of 32: choose a group_size"):
        SymmetricGrid(4, 32).round_weight(torch.zeros(2, 80))


def test_torchao_itself_agrees_through_its_own_configuration() -> None:
    from torchao.quantization import quantize_

    layer = torch.nn.Linear(96, 64, bias=False)
    rounded = SymmetricGrid(4, 32).round_weight(layer.weight.detach())
    quantize_(layer, IntxWeightOnlyConfig(weight_dtype=torch.int4, granularity=PerGroup(32)))
    assert torch.equal(layer.weight.dequantize(), rounded)
