from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from parity import whole
from ranks import run_on_ranks
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor

from lightllm.parallel.tensor_layers import STYLES, embedding, replicated

TOKENS = torch.tensor([[0, 3, 7, 2, 0], [6, 3, 1, 5, 4]])


def output_and_gradients(layer: nn.Module, inputs: Tensor, part: slice = slice(None)) -> list[Tensor]:
    """With the outputs weighed by their place, of which a part may be all that there is."""
    output = layer(inputs)
    weights = torch.arange(output.numel() if part == slice(None) else 2 * output.numel(), dtype=output.dtype)
    weights = weights.view(*output.shape[:-1], -1)[..., part]
    (output * weights).sum().backward()
    found = [whole(one.grad) for one in layer.parameters() if one.grad is not None]
    return [output.detach(), *found, *([inputs.grad] if inputs.grad is not None else [])]


def on_a_rank(
    layer: nn.Module, style: Callable[[nn.Module, object], None], inputs: Tensor, splits_input: bool, part: bool
) -> list[Tensor]:
    mesh, rank = init_device_mesh("cpu", (2,)), torch.distributed.get_rank()
    style(layer, mesh)
    if splits_input:
        half = inputs.shape[-1] // 2
        inputs = inputs[..., rank * half : (rank + 1) * half].detach().requires_grad_()
    elif inputs.is_floating_point():
        inputs = inputs.detach().requires_grad_()
    own = slice(rank * 3, rank * 3 + 3) if part else slice(None)
    found = output_and_gradients(layer, inputs, own)
    assert all(isinstance(one, DTensor) for one in layer.parameters())  # put back after it ran
    return found


@pytest.mark.parametrize("style", ["colwise", "colwise_gather_output", "rowwise"])
@pytest.mark.parametrize("bias", [False, True])
def test_linear_layers(style: str, bias: bool) -> None:
    layer = nn.Linear(4, 6, bias=bias, dtype=torch.float64)
    inputs = torch.randn(2, 5, 4, dtype=torch.float64, requires_grad=True)
    expected = output_and_gradients(copy.deepcopy(layer), inputs)
    arguments = (layer, STYLES[style], inputs, style == "rowwise", style == "colwise")
    for rank, found in enumerate(run_on_ranks(on_a_rank, 2, *arguments)):
        part = slice(rank * 3, rank * 3 + 3) if style == "colwise" else slice(None)
        torch.testing.assert_close(found[0], expected[0][..., part])
        for ours, theirs in zip(found[1:-1], expected[1:-1], strict=True):
            torch.testing.assert_close(ours, theirs)
        theirs = expected[-1][..., rank * 2 : rank * 2 + 2] if style == "rowwise" else expected[-1]
        torch.testing.assert_close(found[-1], theirs)


@pytest.mark.parametrize("padding", [None, 3])
def test_embeddings(padding: int | None) -> None:
    table = nn.Embedding(8, 4, padding_idx=padding, dtype=torch.float64)
    expected = output_and_gradients(copy.deepcopy(table), TOKENS)
    for found in run_on_ranks(on_a_rank, 2, table, embedding, TOKENS, False, False):
        for ours, theirs in zip(found, expected, strict=True):
            torch.testing.assert_close(ours, theirs)
    assert table.padding_idx == padding


def test_a_whole_layer() -> None:
    norm = nn.LayerNorm(4, dtype=torch.float64)
    inputs = torch.randn(2, 4, dtype=torch.float64, requires_grad=True)
    expected = output_and_gradients(copy.deepcopy(norm), inputs)
    for found in run_on_ranks(on_a_rank, 2, norm, replicated, inputs, False, False):
        for ours, theirs in zip(found, expected, strict=True):
            torch.testing.assert_close(ours, theirs)


class Failing(nn.Linear):
    def forward(self, input: Tensor) -> Tensor:
        raise RuntimeError("no")


def failing() -> None:
    layer = Failing(4, 6)
    STYLES["colwise"](layer, init_device_mesh("cpu", (2,)))
    with pytest.raises(RuntimeError, match="no"):
        layer(torch.ones(1, 4))
    assert isinstance(layer.weight, DTensor)


def test_parameters_are_put_back_after_a_failure() -> None:
    run_on_ranks(failing, 2)
