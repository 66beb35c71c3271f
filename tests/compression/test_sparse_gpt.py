from __future__ import annotations

import pytest
import torch
from layer_inputs import damped, layer_and_inputs, output_error
from torch import Tensor

from lightllm.compression.masks import Amount, Pattern, follows, layer_mask, sparsity_of
from lightllm.compression.sparse_gpt import fit_to_mask, sparse_gpt


def algorithm_1(weight: Tensor, moment: Tensor, amount: Amount, block_size: int) -> tuple[Tensor, Tensor]:
    """The paper's algorithm as it is printed, with the inverse's Cholesky factor; `moment` is damped."""
    rows, columns = weight.shape
    mask, w = torch.ones(rows, columns), weight.clone()
    hinv = torch.linalg.cholesky(torch.linalg.inv(moment)).T
    step = amount.group if isinstance(amount, Pattern) else block_size
    for i in range(0, columns, block_size):
        errors = torch.zeros(rows, block_size, dtype=w.dtype)
        for j in range(i, min(i + block_size, columns)):
            if j % step == 0:
                saliency = w[:, j : j + step] ** 2 / torch.diag(hinv)[j : j + step] ** 2
                if isinstance(amount, Pattern):
                    for row in range(rows):
                        for c in saliency[row].argsort()[: step - amount.kept].tolist():
                            mask[row, j + c] = 0
                else:
                    flat = saliency.flatten().argsort()[: round(amount * saliency.numel())]
                    for place in flat.tolist():
                        width = saliency.shape[1]
                        mask[place // width, j + place % width] = 0
            errors[:, j - i] = (1 - mask[:, j]) * w[:, j] / hinv[j, j]
            end = min(i + block_size, columns)
            w[:, j:end] -= errors[:, j - i, None] * hinv[j, j:end]
        end = min(i + block_size, columns)
        w[:, end:] -= errors[:, : end - i] @ hinv[i:end, end:]
    return w * mask, mask.bool()


@pytest.mark.parametrize("block_size", [4, 8, 24])
@pytest.mark.parametrize("amount", [0.5, 0.25, Pattern(2, 4), Pattern(1, 4)])
def test_is_the_papers_algorithm(amount: Amount, block_size: int) -> None:
    weight, inputs = layer_and_inputs(out=8)
    inputs[:, 5] = torch.randn(len(inputs))  # the paper has no input that is never there
    found = sparse_gpt(weight, inputs.T @ inputs, amount, block_size=block_size, damping=0.01)
    expected, mask = algorithm_1(weight, damped(inputs, 0.01), amount, block_size)
    assert torch.equal(found.keep, mask)
    torch.testing.assert_close(found.weight, expected, rtol=1e-8, atol=1e-10)
    assert sparsity_of(found.weight) == sparsity_of(mask)


def test_in_float32_to_a_ten_thousandth() -> None:
    weight, inputs = layer_and_inputs(out=32, width=96, positions=500)
    double = sparse_gpt(weight, inputs.T @ inputs, 0.5, block_size=32)
    single = sparse_gpt(weight.float(), (inputs.T @ inputs).float(), 0.5, block_size=32)
    assert single.weight.dtype == torch.float32
    assert (single.keep == double.keep).float().mean() > 0.999
    same = single.keep == double.keep
    assert ((single.weight - double.weight)[same]).norm() / double.weight.norm() < 1e-3


@pytest.mark.parametrize("block_size", [1, 6, 24])
def test_given_mask_is_obs_column_by_column(block_size: int) -> None:
    """Each pruned weight is made up for by the weights to its right: the least squares solution for them, row by row.

    Equal to 1e-8: the same quadratic problems, solved once by a Cholesky factor and once by normal equations.
    """
    weight, inputs = layer_and_inputs()
    keep = torch.rand_like(weight) > 0.5
    moment = damped(inputs, 0.01)
    expected = weight.clone()
    for row in range(len(weight)):
        for column in range(weight.shape[1]):
            if keep[row, column]:
                continue
            behind = slice(column + 1, None)
            lost = expected[row, column] * moment[behind, column]
            expected[row, behind] += torch.linalg.solve(moment[behind, behind], lost)
            expected[row, column] = 0
    found = fit_to_mask(weight, inputs.T @ inputs, keep, block_size=block_size, damping=0.01)
    torch.testing.assert_close(found, expected, rtol=1e-8, atol=1e-8)


def least_squares(weight: Tensor, moment: Tensor, keep: Tensor) -> Tensor:
    """The best weights for a mask, by brute force: each row's normal equations over what it keeps."""
    best = torch.zeros_like(weight)
    for row, kept in enumerate(keep):
        best[row, kept] = torch.linalg.solve(moment[kept][:, kept], moment[kept] @ weight[row])
    return best


def test_given_mask_is_the_least_squares_solution_where_all_that_goes_stands_left() -> None:
    """Equal to 1e-8: every weight that stays is to the right of every one that goes, and so free to make up for it."""
    weight, inputs = layer_and_inputs()
    keep = torch.arange(24) >= torch.randint(1, 20, (7, 1))
    found = fit_to_mask(weight, inputs.T @ inputs, keep, damping=0.01)
    torch.testing.assert_close(found, least_squares(weight, damped(inputs, 0.01), keep), rtol=1e-8, atol=1e-8)


def test_any_mask_lies_between_the_least_squares_solution_and_no_compensation() -> None:
    weight, inputs = layer_and_inputs(out=16, width=48, positions=400, rank=12)
    keep = layer_mask(torch.rand_like(weight), 0.5)
    moment = damped(inputs, 0.01)

    def error(changed: Tensor) -> float:
        change = changed - weight
        return float(((change @ moment) * change).sum())

    best, plain = error(least_squares(weight, moment, keep)), error(weight * keep)
    ours = error(fit_to_mask(weight, inputs.T @ inputs, keep, damping=0.01))
    assert best <= ours < 0.5 * plain


def test_better_than_its_own_mask_without_compensation_and_than_magnitude() -> None:
    weight, inputs = layer_and_inputs(out=16, width=48, positions=400, rank=12)
    pruned = sparse_gpt(weight, inputs.T @ inputs, 0.5, block_size=16)
    ours = output_error(pruned.weight - weight, inputs)
    assert ours < 0.5 * output_error(weight * pruned.keep - weight, inputs)
    assert ours < 0.5 * output_error(weight * layer_mask(weight.abs(), 0.5) - weight, inputs)


@pytest.mark.parametrize("sparsity", [0.0, 0.1, 0.33, 0.5, 0.97])
def test_exactly_as_many_as_asked_in_uneven_blocks(sparsity: float) -> None:
    weight, inputs = layer_and_inputs(out=7, width=23)
    pruned = sparse_gpt(weight, inputs.T @ inputs, sparsity, block_size=5)
    assert int((~pruned.keep).sum()) == round(sparsity * 7 * 23)
    assert int((pruned.weight == 0).sum()) == round(sparsity * 7 * 23)


def test_a_weight_on_an_input_that_is_never_there_goes_first_and_else_stays_as_it_is() -> None:
    weight, inputs = layer_and_inputs()
    assert not sparse_gpt(weight, inputs.T @ inputs, 0.3).keep[:, 5].any()
    assert torch.equal(sparse_gpt(weight, inputs.T @ inputs, 0.0).weight, weight)


def test_what_is_pruned_stays_pruned() -> None:
    weight, inputs = layer_and_inputs(out=8)
    first = sparse_gpt(weight, inputs.T @ inputs, 0.3, block_size=8)
    second = sparse_gpt(first.weight, inputs.T @ inputs, 0.6, block_size=8, among=first.keep)
    assert not (second.keep & ~first.keep).any()
    assert sparsity_of(second.keep) == pytest.approx(0.6, abs=0.01)
    pattern = sparse_gpt(weight, inputs.T @ inputs, Pattern(2, 4), block_size=8)
    assert follows(pattern.weight, Pattern(2, 4))


def test_a_block_that_cuts_groups_is_refused() -> None:
    weight, inputs = layer_and_inputs()
    with pytest.raises(ValueError, match="block_size is 6, which cuts the groups of 2:4: give a multiple of 4"):
        sparse_gpt(weight, inputs.T @ inputs, Pattern(2, 4), block_size=6)


def test_inputs_of_the_call_stay_as_they_were() -> None:
    weight, inputs = layer_and_inputs()
    moment = inputs.T @ inputs
    before = weight.clone(), moment.clone()
    sparse_gpt(weight, moment, 0.5)
    fit_to_mask(weight, moment, weight > 0)
    assert torch.equal(weight, before[0])
    assert torch.equal(moment, before[1])
