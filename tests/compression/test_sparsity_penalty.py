from __future__ import annotations

import pytest
import torch
from torch import Tensor

from lightllm.compression.sparsity_penalty import AbsoluteSum, RowLasso, UnitLasso, WeightPenalty
from lightllm.compression.units import Units

HEADS = Units("heads", 2, ("q", "k", "v"), "o")
SHAPES = {"q": (12, 5), "k": (6, 5), "v": (6, 5), "o": (5, 12)}
"""Two key/value heads of width 3, each read by two query heads."""


def weights() -> dict[str, Tensor]:
    return {name: torch.randn(shape, dtype=torch.float64) for name, shape in SHAPES.items()}


def head(of: dict[str, Tensor], index: int) -> Tensor:
    """All weights of a head, sliced by hand."""
    parts = [of["q"][6 * index : 6 * index + 6], of["k"][3 * index : 3 * index + 3], of["v"][3 * index : 3 * index + 3]]
    return torch.cat([part.flatten() for part in (*parts, of["o"][:, 6 * index : 6 * index + 6])])


def plain(penalty: WeightPenalty, of: dict[str, Tensor]) -> Tensor:
    """The formula, group by group."""
    if isinstance(penalty, AbsoluteSum):
        return sum((one.abs().sum() for one in of.values()), torch.zeros(()))
    if isinstance(penalty, RowLasso):
        return sum((5**0.5 * row.norm() for row in of["q"]), torch.zeros(()))
    return sum(((6 * 5 + 2 * 3 * 5 + 5 * 6) ** 0.5 * head(of, index).norm() for index in range(2)), torch.zeros(()))


CASES = [(AbsoluteSum(), ("q",)), (RowLasso(), ("q",)), (UnitLasso([HEADS]), ("q", "k", "v", "o"))]


@pytest.mark.parametrize(("penalty", "names"), CASES)
def test_values_and_gradients_are_those_of_the_plain_formula(penalty: WeightPenalty, names: tuple[str, ...]) -> None:
    of = {name: tensor for name, tensor in weights().items() if name in names}
    tracked = {name: tensor.clone().requires_grad_() for name, tensor in of.items()}
    expected = plain(penalty, tracked)
    expected.backward()
    torch.testing.assert_close(penalty.value(of), expected.detach())
    gradients = penalty.gradients(of)
    assert set(gradients) == set(names)
    for name in names:
        torch.testing.assert_close(gradients[name], tracked[name].grad)


@pytest.mark.parametrize(("penalty", "names"), CASES)
def test_at_zero_the_gradient_is_zero(penalty: WeightPenalty, names: tuple[str, ...]) -> None:
    gradients = penalty.gradients({name: torch.zeros(SHAPES[name]) for name in names})
    assert not any(gradient.any() for gradient in gradients.values())
    of = weights()
    of["q"][0] = 0
    assert not RowLasso().gradients({"q": of["q"]})["q"][0].any()


def test_sizes_are_root_mean_squares_and_masks_are_whole_groups() -> None:
    of = weights()
    torch.testing.assert_close(AbsoluteSum().sizes({"q": of["q"]}).view(12, 5), of["q"].abs())
    torch.testing.assert_close(
        RowLasso().sizes({"q": of["q"]}), torch.stack([row.square().mean().sqrt() for row in of["q"]])
    )
    lasso = UnitLasso([HEADS])
    sizes = lasso.sizes(of)
    torch.testing.assert_close(sizes, torch.stack([head(of, index).square().mean().sqrt() for index in range(2)]))
    keep = lasso.spread(torch.tensor([True, False]), of)
    assert {name: mask.shape for name, mask in keep.items()} == {name: tensor.shape for name, tensor in of.items()}
    assert head(keep, 0).all()
    assert not head(keep, 1).any()
    rows = RowLasso().spread(torch.arange(12) < 4, {"q": of["q"]})["q"]
    assert rows[:4].all()
    assert not rows[4:].any()


def test_what_has_to_be_looked_at_together() -> None:
    assert AbsoluteSum().sets(["a", "b"]) == RowLasso().sets(["a", "b"]) == [("a",), ("b",)]
    assert UnitLasso([HEADS]).sets(["a", "b"]) == [("q", "k", "v", "o")]
