"""The operator's contract with torch: schema, shapes under tracing, no aliases of inputs."""

from __future__ import annotations

import pytest
import torch

from lightllm.losses.divergence_terms import DIVERGENCES
from lightllm.losses.position_divergences import position_divergences


def arguments(kind: str, chunk_tokens: int | None, needs: tuple[bool, bool, bool]) -> tuple:
    generator = torch.Generator().manual_seed(1)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    labels = torch.randint(0, 20, (2, 5), generator=generator)
    labels[0, 0] = -100
    student, teacher = (random(2, 5, 8), random(20, 8), random(20)), (random(2, 5, 6), random(20, 6), None)
    values = (kind, 2.0, 0.3, 0.6, 0.5, 3.0, 2.0, None, 1.0, -100, chunk_tokens, torch.float32, torch.float32)
    return (*student, *teacher, labels, *values, *needs)


@pytest.mark.parametrize("needs", [(False, False, False), (True, False, False), (True, True, True)])
@pytest.mark.parametrize("kind", ["forward_kl", "decoupled"])
def test_operator_contract(kind: str, needs: tuple[bool, bool, bool]) -> None:
    given = arguments(kind, 4, needs)
    torch.library.opcheck(position_divergences, given, test_utils=("test_schema", "test_faketensor"))


@pytest.mark.parametrize("kind", DIVERGENCES)
def test_chunks_do_not_matter(kind: str) -> None:
    whole, cut = (position_divergences(*arguments(kind, chunk, (True, True, True))) for chunk in (None, 3))
    assert whole[0][0, 0] == 0.0
    torch.testing.assert_close(whole, cut)
