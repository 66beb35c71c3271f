from __future__ import annotations

import gguf
import pytest
import torch
from torch import Tensor
from torchao.quantization import PerRow
from torchao.quantization.qat import IntxFakeQuantizeConfig
from torchao.quantization.qat.fake_quantizer import IntxFakeQuantizer
from torchao.quantization.quantize_.workflows import Int8Tensor
from torchao.quantization.quantize_.workflows.intx.intx_unpacked_to_int8_tensor import (
    _apply_int8_act_asym_per_token_quant_dequant as torchaos_linear_layer,
)

from lightllm.compression.token_rounding import round_asymmetric, round_blocks, round_symmetric

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.fixture(params=range(4))
def inputs(request: pytest.FixtureRequest) -> Tensor:
    """Tokens of very different sizes, some of one sign only, one of zeros."""
    values = torch.randn(3, 40, 96, generator=torch.Generator().manual_seed(request.param))
    values *= 10 ** torch.randn(3, 40, 1)
    values[1] = values[1].abs() + 1
    values[2] = -values[2].abs()
    values[0, 0] = 0
    return values


@pytest.mark.parametrize("dtype", DTYPES)
def test_asymmetric_is_what_torchao_trains_and_runs(inputs: Tensor, dtype: torch.dtype) -> None:
    inputs = inputs.to(dtype)
    rounded = round_asymmetric(inputs)
    configuration = IntxFakeQuantizeConfig(torch.int8, "per_token", is_symmetric=False, scale_precision=None)
    assert rounded.dtype == dtype
    assert torch.equal(rounded, IntxFakeQuantizer(configuration)(inputs))
    assert torch.equal(rounded, torchaos_linear_layer(inputs))


@pytest.mark.parametrize("dtype", DTYPES)
def test_symmetric_is_torchaos_int8_tensor(inputs: Tensor, dtype: torch.dtype) -> None:
    inputs = inputs.to(dtype)
    assert torch.equal(round_symmetric(inputs), Int8Tensor.from_hp(inputs, PerRow()).dequantize())


def test_blocks_are_ggufs(inputs: Tensor) -> None:
    form = gguf.GGMLQuantizationType.Q8_0
    expected = gguf.quants.dequantize(gguf.quants.quantize(inputs.numpy(), form), form)
    assert torch.equal(round_blocks(inputs), torch.from_numpy(expected))
    assert round_blocks(inputs.bfloat16()).dtype == torch.bfloat16


@pytest.mark.parametrize("function", [round_asymmetric, round_symmetric, round_blocks])
def test_inputs_are_left_as_they_were(inputs: Tensor, function: object) -> None:
    before = inputs.clone()
    assert callable(function)
    function(inputs)
    assert torch.equal(inputs, before)
