from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor

from lightllm.compression.rank_choice import RankChoice, Shape, rank_for_energy, rank_for_share, ranks_for_total

SHAPES = {"a.q_proj": Shape(8, 8), "a.up_proj": Shape(20, 8), "b.q_proj": Shape(8, 8), "b.up_proj": Shape(20, 8)}


def spectra(seed: int = 0) -> dict[str, Tensor]:
    """Singular values that fall off quickly in some layers and slowly in others."""
    generator = torch.Generator().manual_seed(seed)
    return {
        name: (torch.rand(8, generator=generator) ** (2 * number)).sort(descending=True).values * 10**number
        for number, name in enumerate(SHAPES, 1)
    }


def parameters(ranks: dict[str, int]) -> int:
    return sum(
        ranks[name] * (out + inputs) if name in ranks else out * inputs for name, (out, inputs) in SHAPES.items()
    )


def test_energy_takes_the_smallest_rank_that_keeps_so_much() -> None:
    values = torch.tensor([3.0, 2.0, 1.0, 1.0])  # squares 9, 4, 1, 1
    expected = {0.59: 1, 0.61: 2, 0.86: 2, 0.87: 3, 0.94: 4, 0.999: 4}
    assert {energy: rank_for_energy(values, energy) for energy in expected} == expected
    for seed, energy in itertools.product(range(5), (0.3, 0.8, 0.95)):
        for one in spectra(seed).values():
            rank, squares = rank_for_energy(one, energy), one.double().square()
            assert squares[:rank].sum() >= energy * squares.sum() * (1 - 1e-12)
            assert rank == 1 or squares[: rank - 1].sum() < energy * squares.sum()


def test_a_share_is_not_exceeded_and_used_up() -> None:
    for shape in SHAPES.values():
        for budget in (0.3, 0.5, 0.9):
            rank = rank_for_share(shape, budget)
            assert rank * (shape.num_outputs + shape.num_inputs) <= budget * shape.num_parameters
            assert (rank + 1) * (shape.num_outputs + shape.num_inputs) > budget * shape.num_parameters


def test_the_largest_saving_rank_saves_and_one_more_does_not() -> None:
    for shape in (Shape(8, 8), Shape(20, 8), Shape(2, 2), Shape(1, 5)):
        rank = shape.largest_saving_rank
        assert rank * sum(shape) < shape.num_parameters <= (rank + 1) * sum(shape)
    assert Shape(1, 5).largest_saving_rank == 0


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("budget", [0.35, 0.5, 0.8])
def test_one_budget_goes_to_the_components_that_are_worth_most(seed: int, budget: float) -> None:
    values = spectra(seed)
    ranks = RankChoice(budget=budget, allocation="global").ranks(SHAPES, values)
    total = sum(shape.num_parameters for shape in SHAPES.values())
    assert parameters(ranks) <= budget * total
    shares = {name: one.double().square() / one.double().square().sum() for name, one in values.items()}
    by_rank = {name: [float(one[rank:].sum()) for rank in range(9)] for name, one in shares.items()}

    def lost(one: dict[str, int]) -> float:
        return sum(by_rank[name][rank] for name, rank in one.items())

    # No choice of ranks that costs no more loses less, of all there are.
    options = [range(1, shape.largest_saving_rank + 2) for shape in SHAPES.values()]
    affordable = []
    for one in itertools.product(*options):
        pairs = zip(SHAPES, one, strict=True)
        choice = {name: rank for name, rank in pairs if rank <= SHAPES[name].largest_saving_rank}
        if parameters(choice) <= parameters(ranks):
            affordable.append(lost(choice))
    assert lost(ranks) == pytest.approx(min(affordable), abs=1e-9)
    assert lost(ranks) < lost(RankChoice(budget=budget).ranks(SHAPES, {}))


def test_a_layer_that_needs_all_of_its_components_stays_whole() -> None:
    values = {"a.q_proj": torch.ones(8), "a.up_proj": torch.tensor([1.0, *[1e-6] * 7])}
    shapes = {name: SHAPES[name] for name in values}
    assert ranks_for_total(shapes, values, 0.5) == {"a.up_proj": 1}
    assert RankChoice(budget=0.5, allocation="global").ranks(shapes, values) == {"a.up_proj": 1}


def test_ranks_by_name_come_first_and_the_first_expression_decides() -> None:
    choice = RankChoice(by_layer={r"a\.q": 2, "q_proj": 3})
    assert choice.ranks(SHAPES, {}) == {"a.q_proj": 2, "b.q_proj": 3}
    with_rest = RankChoice(budget=0.5, by_layer={"q_proj": 3})
    assert with_rest.ranks(SHAPES, {}) == {"a.q_proj": 3, "a.up_proj": 2, "b.q_proj": 3, "b.up_proj": 2}
    assert list(with_rest.ranks(SHAPES, {})) == list(SHAPES)


def test_a_layer_stays_whole_where_the_rank_saves_nothing() -> None:
    values = {"flat": torch.ones(8), "steep": torch.tensor([1.0, *[1e-6] * 7])}
    shapes = {"flat": Shape(8, 8), "steep": Shape(8, 8)}
    assert RankChoice(energy=0.9).ranks(shapes, values) == {"steep": 1}
    assert RankChoice(budget=0.1).ranks({"a": Shape(8, 8)}, {}) == {}  # 6 parameters are less than a component


def test_what_needs_singular_values_says_so() -> None:
    assert RankChoice(energy=0.9).needs_values
    assert RankChoice(budget=0.9, allocation="global").needs_values
    assert not RankChoice(budget=0.9).needs_values
    assert not RankChoice(by_layer={"q": 2}).needs_values


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({}, "nothing decides the ranks: give energy, budget or by_layer"),
        ({"energy": 0.5, "budget": 0.5}, "give one of them"),
        ({"energy": 1.5}, r"energy is 1.5: give a share above 0 and below 1"),
        ({"budget": 0}, r"budget is 0: give a share"),
        ({"energy": 0.5, "allocation": "global"}, "spends a budget, and there is none"),
        ({"by_layer": {"q": 0}}, "gives 'q' rank 0"),
    ],
)
def test_senseless_choices_are_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        RankChoice(**fields)


def test_ranks_by_name_that_cannot_be_are_refused() -> None:
    with pytest.raises(ValueError, match=r"no layer's name matches 'k_proj'; 'a.q_proj' is one"):
        RankChoice(by_layer={"k_proj": 2}).ranks(SHAPES, {})
    with pytest.raises(ValueError, match=r"rank 4 of a.q_proj, which is 8 by 8, saves no parameters: give at most 3"):
        RankChoice(by_layer={"q_proj": 4}).ranks(SHAPES, {})
