from __future__ import annotations

import pytest
import torch
from torch import nn

from lightllm.compression.masks import Pattern, layer_mask
from lightllm.compression.semi_structured import semi_structured_layers, use_semi_structured_kernels


def layer(out: int, inputs: int, pattern: Pattern | None = None, dtype: torch.dtype = torch.bfloat16) -> nn.Linear:
    made = nn.Linear(inputs, out, dtype=dtype)
    if pattern is not None:
        made.weight.data *= layer_mask(made.weight.detach().abs(), pattern)
    return made


def test_layers_that_the_kernels_take() -> None:
    network = nn.ModuleDict(
        {
            "taken": layer(64, 128, Pattern(2, 4)),
            "sparser": layer(32, 64, Pattern(1, 4), torch.float16),
            "dense": layer(64, 128),
            "other_pattern": layer(64, 128, Pattern(4, 8)),
            "float32": layer(64, 128, Pattern(2, 4), torch.float32),
            "narrow": layer(64, 32, Pattern(2, 4)),
            "low": layer(16, 64, Pattern(2, 4)),
            "none": nn.LayerNorm(8),
        }
    )
    assert list(semi_structured_layers(network)) == ["taken", "sparser"]


def test_refused_without_a_gpu() -> None:
    with pytest.raises(ValueError, match=r"need a CUDA device, and the network is on cpu.*computes the same"):
        use_semi_structured_kernels(layer(64, 128, Pattern(2, 4)))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU of compute capability 8.0 or more")
def test_computes_the_same_on_a_gpu() -> None:
    network = nn.Sequential(layer(64, 128, Pattern(2, 4)), layer(64, 64)).cuda()
    inputs = torch.randn(32, 128, dtype=torch.bfloat16, device="cuda")
    with torch.no_grad():
        expected = network(inputs)
        assert use_semi_structured_kernels(network) == ["0"]
        torch.testing.assert_close(network(inputs), expected, rtol=2e-2, atol=2e-2)
    with pytest.raises(ValueError, match="no linear layer of the network is 2:4"):
        use_semi_structured_kernels(nn.Sequential(layer(64, 64)).cuda())
