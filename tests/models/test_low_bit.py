import pytest
import torch
from bitsandbytes.functional import dequantize_4bit, quantize_4bit
from bitsandbytes.nn import Linear4bit, Linear8bitLt
from torch import Tensor, nn

from lightllm.models.low_bit import dequantized_weight, is_low_bit, keep_differentiable


def four_bit(weight: Tensor) -> Linear4bit:
    layer = Linear4bit(weight.shape[1], weight.shape[0], bias=False, compute_dtype=torch.float32, quant_type="nf4")
    layer.load_state_dict({"weight": weight})
    return layer.to("cpu")


def test_gradients_survive_an_evaluation() -> None:
    network = keep_differentiable(nn.Sequential(four_bit(torch.randn(64, 64)), nn.Linear(64, 2)))
    inputs = torch.randn(3, 64, requires_grad=True)

    def training_step() -> tuple[Tensor, Tensor]:
        outputs = network.train()(inputs)
        return outputs.detach(), torch.autograd.grad(outputs.sum(), inputs)[0]

    before = training_step()
    with torch.no_grad():
        evaluated = network.eval()(inputs)
    after = training_step()
    assert torch.equal(evaluated, before[0])
    assert torch.equal(after[0], before[0])
    assert torch.equal(after[1], before[1])


@pytest.mark.parametrize("evaluated", [False, True])
def test_a_weight_is_read_back_as_it_is_multiplied_by(evaluated: bool) -> None:
    weight = torch.randn(64, 128)
    expected = dequantize_4bit(*quantize_4bit(weight, quant_type="nf4", compress_statistics=True))
    layer = four_bit(weight)
    if evaluated:  # where the processor allows it, bitsandbytes now packs the weight, with rounded scales
        with torch.no_grad():
            layer.eval()(torch.randn(1, 128))
    state = layer.weight.data.clone()
    read = dequantized_weight(layer)
    assert read.dtype == torch.float32
    torch.testing.assert_close(read, expected, atol=0.02 if evaluated else 0.0, rtol=0.0)
    assert torch.equal(layer.weight.data, state)


def test_eight_bits_are_read_back_too() -> None:
    layer = Linear8bitLt(64, 32, bias=False, has_fp16_weights=False)
    weight = torch.randn(32, 64)
    layer.load_state_dict({"weight": weight})
    layer = layer.to("cpu")
    assert is_low_bit(layer)
    torch.testing.assert_close(dequantized_weight(layer), weight, atol=0.03, rtol=0.0)


def test_ordinary_layers_are_not_low_bit() -> None:
    assert is_low_bit(four_bit(torch.randn(64, 64)))
    assert not is_low_bit(nn.Linear(2, 2))
    assert not is_low_bit(nn.Dropout())
