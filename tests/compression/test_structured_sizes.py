from __future__ import annotations

from typing import Any

import pytest
import torch
from tiny_architectures import tiny_architecture

from lightllm.compression.structure import Sizes, Structure, structure_of
from lightllm.compression.structured_removal import Kept, remove
from lightllm.compression.structured_sizes import Removal, check_removal, kept_sizes, num_parameters


def structure_with(architecture: str = "qwen3", **fields: Any) -> Structure:
    fields = {"num_hidden_layers": 6, "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 4} | fields
    return structure_of(tiny_architecture(architecture, **fields))


@pytest.mark.parametrize("architecture", ["llama", "qwen3"])
@pytest.mark.parametrize("tied", [True, False])
def test_the_number_of_parameters_is_that_of_the_network_that_comes_of_it(architecture: str, tied: bool) -> None:
    structure = structure_with(architecture, tie_word_embeddings=tied, attention_bias=True)
    network = structure.network
    assert num_parameters(structure, structure.sizes) == sum(one.numel() for one in network.parameters())
    sizes = Sizes(layers=4, heads=2, neurons=29, channels=20)
    expected = num_parameters(structure, sizes)
    kept = [torch.arange(count).repeat(4, 1) for count in (2, 29)]
    remove(network, Kept(torch.arange(4), kept[0], kept[1], torch.arange(20), torch.ones(9)))
    assert sum(one.numel() for one in network.parameters()) == expected
    assert structure_of(network).sizes == sizes


@pytest.mark.parametrize(
    ("removal", "expected"),
    [
        (Removal(layers=2), Sizes(4, 4, 48, 32)),
        (Removal(layers=0.25), Sizes(4, 4, 48, 32)),  # 4.5 would stay: of equally near ones the smaller
        (Removal(heads=0.3, neurons=0.1), Sizes(6, 3, 43, 32)),
        (Removal(heads=1, neurons=7, channels=2), Sizes(6, 3, 41, 30)),
        (Removal(channels=0.5, layers=5), Sizes(1, 4, 48, 16)),
        (Removal(heads=0.99), Sizes(6, 1, 48, 32)),  # one always stays
    ],
)
def test_shares_and_counts(removal: Removal, expected: Sizes) -> None:
    check_removal(removal)
    assert kept_sizes(structure_with(), removal) == expected


@pytest.mark.parametrize("beside", [{}, {"layers": 1}, {"heads": 2, "channels": 4}])
def test_no_more_neurons_go_than_a_share_of_the_parameters_takes(beside: dict[str, int]) -> None:
    structure = structure_with()
    sizes = kept_sizes(structure, Removal(parameters=0.3, **beside))
    assert sizes.layers == 6 - beside.get("layers", 0)
    most = 0.7 * num_parameters(structure, structure.sizes)
    assert num_parameters(structure, sizes) <= most
    assert num_parameters(structure, sizes._replace(neurons=sizes.neurons + 1)) > most


def test_shares_of_many_keep_multiples_of_32() -> None:
    structure = structure_with(intermediate_size=1536, hidden_size=576, num_hidden_layers=1)
    assert kept_sizes(structure, Removal(neurons=0.4)).neurons == 928  # 921.6
    assert kept_sizes(structure, Removal(channels=0.2)).channels == 448  # 460.8
    sizes = kept_sizes(structure, Removal(parameters=0.25))
    most = 0.75 * num_parameters(structure, structure.sizes)
    assert sizes.neurons % 32 == 0
    assert (
        num_parameters(structure, sizes) <= most < num_parameters(structure, sizes._replace(neurons=sizes.neurons + 32))
    )
    assert kept_sizes(structure, Removal(neurons=601)).neurons == 935  # a count is what it says


def test_llamas_width_is_divisible_by_its_heads() -> None:
    """Which transformers checks when a configuration is saved, though no head's width follows from it."""
    structure = structure_with("llama", num_attention_heads=8, num_key_value_heads=4)
    assert kept_sizes(structure, Removal(heads=0.2)).heads == 2  # not 3, which were 6 query heads to a width of 32
    assert kept_sizes(structure, Removal(channels=0.25)).channels == 24
    assert kept_sizes(structure, Removal(channels=0.2)).channels == 24  # not 26
    assert kept_sizes(structure, Removal(heads=1, channels=2)) == Sizes(6, 3, 48, 30)
    with pytest.raises(ValueError, match=r"heads is 1, which leaves 3, .*32\) is not a multiple .*6\)\): remove 2, 3"):
        kept_sizes(structure, Removal(heads=1))
    with pytest.raises(ValueError, match=r"channels is 2, which leaves 30, .*: remove 8, 16, 24"):
        kept_sizes(structure, Removal(channels=2))
    kept_sizes(structure_with("qwen3", num_attention_heads=8, num_key_value_heads=4), Removal(heads=1))


@pytest.mark.parametrize(
    ("removal", "message"),
    [
        (Removal(), "nothing is to be removed: give layers, heads, neurons, channels or parameters"),
        (Removal(layers=-1), "layers is -1: give a share between 0 and 1"),
        (Removal(neurons=1.0), r"neurons is 1.0: give a share between 0 and 1 \(0.25\) or a count \(2\)"),
        (Removal(heads=True), "heads is True"),
        (Removal(channels=float("nan")), "channels is nan"),
        (Removal(parameters=1.0), "parameters is 1.0: give a share below 1"),
        (Removal(parameters=2), "parameters is 2: give a share below 1"),
        (Removal(parameters=0.2, neurons=3), "neurons is 3 and parameters is 0.2, but neurons are what makes up"),
    ],
)
def test_what_no_network_can_have_is_refused(removal: Removal, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check_removal(removal)


@pytest.mark.parametrize(
    ("removal", "message"),
    [
        (Removal(layers=6), "layers is 6, and the network has 6: at least one must stay"),
        (Removal(heads=0.1), "heads is 0.1, and of 4 that is nearest to none: give a larger share or a count"),
        (
            Removal(parameters=0.9),
            "parameters is 0.9, and with all MLP neurons but one no more than 0",
        ),
        (
            Removal(parameters=0.1, layers=3),
            r"what else is removed is 0\.\d+ of them already: raise it",
        ),
    ],
)
def test_what_this_network_cannot_have_is_refused(removal: Removal, message: str) -> None:
    check_removal(removal)
    with pytest.raises(ValueError, match=message):
        kept_sizes(structure_with(), removal)
