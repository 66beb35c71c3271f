from __future__ import annotations

from typing import Any

import pytest
import torch
from ranks import run_on_ranks
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

from lightllm.batch import IGNORE_INDEX
from lightllm.losses import (
    linear_cross_entropy,
    linear_divergence,
    linear_log_probabilities,
    linear_token_statistics,
)

VOCABULARY, HIDDEN = 24, 8
OPTIONS: dict[str, Any] = {"label_smoothing": 0.1, "z_loss": 0.01, "softcap": 3.0, "logit_scale": 0.7}


class Inputs:
    """Hidden states, a head and labels, always the same; in double precision nothing but a mistake matters."""

    def __init__(self, dtype: torch.dtype = torch.float64) -> None:
        generator = torch.Generator().manual_seed(3)
        self.hidden = torch.randn(2, 9, HIDDEN, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()
        self.weight = torch.randn(VOCABULARY, HIDDEN, generator=generator, dtype=torch.float64).to(dtype)
        self.bias = torch.randn(VOCABULARY, generator=generator, dtype=torch.float64).to(dtype)
        self.labels = torch.randint(VOCABULARY, (2, 9), generator=generator)
        self.labels[0, :3] = IGNORE_INDEX

    def leaves(self, placement: Any = None) -> tuple[Tensor, Tensor]:
        """Weight and bias that want a gradient: whole, or laid out over all ranks."""
        tensors = [self.weight, self.bias]
        if placement is not None:
            mesh = init_device_mesh("cpu", (torch.distributed.get_world_size(),))
            tensors = [distribute_tensor(tensor, mesh, [placement], src_data_rank=None) for tensor in tensors]
        return tensors[0].requires_grad_(), tensors[1].requires_grad_()


def gradients(inputs: Inputs, loss: Tensor, *leaves: Tensor) -> list[Tensor]:
    (loss * 0.5).backward()
    found = []
    for leaf in (inputs.hidden, *leaves):
        assert leaf.grad is not None
        if isinstance(leaf, DTensor):
            assert isinstance(leaf.grad, DTensor)
            assert leaf.grad.placements == leaf.placements
        found.append(leaf.grad.full_tensor() if isinstance(leaf.grad, DTensor) else leaf.grad)
    return [loss.detach(), *found]


def cross_entropy(
    placement: Any, chunk_tokens: int | None, options: dict[str, Any], dtype: torch.dtype
) -> list[Tensor]:
    inputs = Inputs(dtype)
    weight, bias = inputs.leaves(placement)
    loss = linear_cross_entropy(inputs.hidden, weight, inputs.labels, bias=bias, chunk_tokens=chunk_tokens, **options)
    return gradients(inputs, loss, weight, bias)


@pytest.mark.parametrize("placement", [Shard(0), Replicate()])
@pytest.mark.parametrize(("chunk_tokens", "options"), [(None, {}), (4, OPTIONS), (1, {})])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-6)])
def test_loss_and_gradients_are_those_of_the_whole_head(
    placement: Any, chunk_tokens: int | None, options: dict[str, Any], dtype: torch.dtype, tolerance: float
) -> None:
    expected = cross_entropy(None, None, options, torch.float64)
    for found in run_on_ranks(cross_entropy, 3, placement, chunk_tokens, options, dtype):
        for ours, theirs in zip(found, expected, strict=True):
            torch.testing.assert_close(ours.double(), theirs.double(), rtol=tolerance, atol=tolerance)


def log_probabilities(placement: Any) -> list[Tensor]:
    inputs = Inputs()
    weight, bias = inputs.leaves(placement)
    positions = linear_log_probabilities(inputs.hidden, weight, inputs.labels, bias=bias, softcap=4.0, chunk_tokens=4)
    return [positions.detach(), *gradients(inputs, (positions.sigmoid() * positions).sum(), weight, bias)]


def statistics(placement: Any) -> list[Tensor]:
    inputs = Inputs()
    weight, bias = inputs.leaves(placement)
    with torch.no_grad():
        best = (inputs.hidden @ inputs.weight.T + inputs.bias).argmax(-1)
        inputs.labels[1] = best[1]  # so that guesses are right on every rank's part
    return list(linear_token_statistics(inputs.hidden, weight, inputs.labels, bias=bias, chunk_tokens=4))


def divergence(placement: Any) -> list[Tensor]:
    inputs = Inputs()
    weight, _ = inputs.leaves(placement)
    teacher = inputs.weight.detach().flip(0)
    loss = linear_divergence(inputs.hidden, weight, inputs.hidden.detach(), teacher, inputs.labels)
    return gradients(inputs, loss, weight)


@pytest.mark.parametrize("function", [log_probabilities, statistics, divergence])
def test_other_uses_of_the_head_are_those_of_the_whole_one(function: Any) -> None:
    expected = function(None)
    for found in run_on_ranks(function, 2, Shard(0)):
        for ours, theirs in zip(found, expected, strict=True):
            torch.testing.assert_close(ours, theirs)
    if function is statistics:
        assert 9 <= expected[2] < 15


def labels_beyond() -> None:
    inputs = Inputs()
    inputs.labels[1, 1] = VOCABULARY
    weight, _ = inputs.leaves(Shard(0))
    with pytest.raises(ValueError, match=f"label {VOCABULARY} .* outside the vocabulary of {VOCABULARY}"):
        linear_cross_entropy(inputs.hidden, weight, inputs.labels)


def test_a_label_outside_the_whole_vocabulary_is_refused() -> None:
    run_on_ranks(labels_beyond, 2)
