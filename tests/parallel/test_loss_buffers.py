"""The loss's buffers against what its operator allocates."""

from __future__ import annotations

import pytest
import torch
from measured_memory import peak_allocated

from lightllm.losses import linear_cross_entropy
from lightllm.parallel.loss_buffers import loss_buffers


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("trains", [False, True])
@pytest.mark.parametrize(("vocab", "tokens"), [(500, 300), (20_000, 300), (20_000, 1000)])
def test_the_peak_is_what_torch_allocates(
    dtype: torch.dtype, autocast: bool, trains: bool, vocab: int, tokens: int
) -> None:
    hidden = torch.randn(tokens, 64, dtype=dtype, requires_grad=True)
    head = torch.randn(vocab, 64, dtype=dtype, requires_grad=trains)
    labels = torch.randint(vocab, (tokens,))
    product = torch.bfloat16 if autocast else dtype
    found = loss_buffers(tokens, tokens, head, dtype, product)
    losses: list[torch.Tensor] = []

    def forward() -> None:
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            losses.append(linear_cross_entropy(hidden, head, labels))

    # In bfloat16, a CPU's products take turned copies of their factors for a moment.
    tolerance = 0.05 if product == torch.float32 else 0.17
    assert found.forward == pytest.approx(peak_allocated(forward), rel=tolerance)
    gradients = hidden.numel() * dtype.itemsize + head.numel() * dtype.itemsize * trains
    assert found.kept == gradients
    assert found.backward == pytest.approx(peak_allocated(losses[0].backward), rel=0.05)


def test_few_targets_take_small_buffers() -> None:
    head = torch.empty(1000, 64)
    few, all_of_them = (loss_buffers(400, targets, head, torch.float32, torch.float32) for targets in (40, 400))
    assert few.forward < 0.3 * all_of_them.forward
    assert few.kept == all_of_them.kept
