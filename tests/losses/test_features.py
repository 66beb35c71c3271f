from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from lightllm.losses.features import attention_relations, hidden_cosine, hidden_mse


@pytest.fixture
def chosen() -> Tensor:
    chosen = torch.rand(2, 6) > 0.4
    chosen[0, 0] = True
    return chosen


def test_hidden_mse_and_cosine_position_by_position(chosen: Tensor) -> None:
    student, teacher = torch.randn(2, 6, 5), torch.randn(2, 6, 5)
    squares, cosines = 0.0, 0.0
    for row, column in chosen.nonzero().tolist():
        s, t = student[row, column].tolist(), teacher[row, column].tolist()
        squares += sum((a - b) ** 2 for a, b in zip(s, t, strict=True)) / 5
        cosines += 1 - sum(a * b for a, b in zip(s, t, strict=True)) / (math.hypot(*s) * math.hypot(*t))
    assert float(hidden_mse(student, teacher, chosen)) == pytest.approx(squares, rel=1e-5)
    assert float(hidden_cosine(student, teacher, chosen)) == pytest.approx(cosines, rel=1e-5)


def test_relations_position_by_position(chosen: Tensor) -> None:
    student, teacher = torch.randn(2, 6, 8), torch.randn(2, 6, 12)
    document = torch.tensor([[0, 0, 0, 1, 1, 1], [4, 4, 4, 4, 4, -1]])
    expected = 0.0
    for row, t in chosen.nonzero().tolist():
        seen = [s for s in range(t + 1) if document[row, s] == document[row, t]]
        for head in range(2):
            relations = []
            for vectors, width in ((teacher, 6), (student, 4)):
                a = vectors[row, :, head * width : (head + 1) * width]
                relations.append(torch.softmax(torch.stack([a[t] @ a[s] for s in seen]) / math.sqrt(width), 0))
            expected += float((relations[0] * (relations[0] / relations[1]).log()).sum()) / 2
    assert float(attention_relations(student, teacher, document, chosen, 2)) == pytest.approx(expected, rel=1e-4)


def test_relations_of_an_encoder_see_later_positions(chosen: Tensor) -> None:
    student, teacher = torch.randn(2, 6, 8), torch.randn(2, 6, 8)
    document, only_first = torch.zeros(2, 6), torch.zeros(2, 6, dtype=torch.bool)
    only_first[:, 0] = True
    assert attention_relations(student, teacher, document, only_first, 2) == 0.0  # each sees itself alone
    assert attention_relations(student, teacher, document, only_first, 2, causal=False) > 0.01


@pytest.mark.parametrize("name", ["mse", "cosine", "relations"])
def test_zero_at_equality_gradients_and_parts_add_up(name: str, chosen: Tensor) -> None:
    document = torch.zeros(2, 6)

    def loss(student: Tensor, teacher: Tensor, rows: slice = slice(None)) -> Tensor:
        if name == "relations":
            return attention_relations(student[rows], teacher[rows], document[rows], chosen[rows], 2)
        return {"mse": hidden_mse, "cosine": hidden_cosine}[name](student[rows], teacher[rows], chosen[rows])

    student = torch.randn(2, 6, 4, dtype=torch.float64).requires_grad_()
    teacher = torch.randn(2, 6, 4, dtype=torch.float64).requires_grad_()
    assert loss(teacher, teacher).detach().abs() < 1e-12
    assert torch.autograd.gradcheck(lambda student: loss(student, teacher), student)
    whole = loss(student, teacher)
    torch.testing.assert_close(whole, loss(student, teacher, slice(1)) + loss(student, teacher, slice(1, 2)))
    whole.backward()
    assert teacher.grad is None
    low = loss(student.detach().bfloat16(), teacher.detach().bfloat16())
    assert low.dtype == torch.float32
    torch.testing.assert_close(low.double(), whole.detach(), rtol=5e-2, atol=0.0)


def test_shapes_that_do_not_fit(chosen: Tensor) -> None:
    with pytest.raises(ValueError, match=r"\[2, 6, 4\], the teacher's \[2, 6, 5\] and the positions \[2, 6\]"):
        hidden_mse(torch.randn(2, 6, 4), torch.randn(2, 6, 5), chosen)
    with pytest.raises(ValueError, match="vectors of 4 numbers cannot be cut into 3 relation heads"):
        attention_relations(torch.randn(2, 6, 4), torch.randn(2, 6, 6), torch.zeros(2, 6), chosen, 3)
    with pytest.raises(ValueError, match=r"don't fit together"):
        attention_relations(torch.randn(2, 5, 4), torch.randn(2, 6, 4), torch.zeros(2, 6), chosen, 2)
