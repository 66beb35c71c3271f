from __future__ import annotations

from copy import deepcopy

import pytest
import torch
from own_networks import Gru
from staged_run import packed_rows
from tiny_architectures import PACKING, tiny_architecture
from tiny_networks import tiny_gpt2, tiny_llama
from torch import Tensor, nn

from lightllm.models import LoRA
from lightllm.models.anatomy import OwnNetwork, output_head, vocabulary_size
from lightllm.models.hidden_states import hidden_states
from lightllm.parallel.layout import find_layout
from lightllm.parallel.stages import Stage, check_composition, drop_others, make_stages, shared_between


def alone(network: nn.Module, sizes: list[int], index: int) -> Stage:
    """One stage of a copy of the network, of which nothing else is there."""
    stages = make_stages(find_layout(deepcopy(network)), sizes)
    drop_others(stages, [index])
    return stages[index]


def one_after_another(network: nn.Module, sizes: list[int]) -> Tensor:
    batch, received = packed_rows(3, seed=5), None
    for index in range(len(sizes)):
        received = alone(network, sizes, index).run(batch, received)
    assert received is not None
    return received


@pytest.mark.parametrize("architecture", PACKING)
def test_stages_one_after_another_are_the_whole(architecture: str) -> None:
    network = tiny_architecture(architecture, num_hidden_layers=3)
    with torch.no_grad():
        expected = hidden_states(network, packed_rows(3, seed=5))
        torch.testing.assert_close(one_after_another(network, [1, 1, 1]), expected)


def test_an_adapted_network_and_one_of_ones_own() -> None:
    adapted = LoRA(rank=4).attach(tiny_llama())
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter)
    own = OwnNetwork(Gru(40), "out")
    for network in (adapted, own):
        with torch.no_grad():
            expected = hidden_states(network, packed_rows(3, seed=5))
            torch.testing.assert_close(one_after_another(network, [1, 1]), expected)


def test_a_gradient_goes_back_from_stage_to_stage() -> None:
    network = tiny_llama(tied=False).train()
    batch = packed_rows(2, seed=3)
    stages = make_stages(find_layout(network), [1, 1])
    hidden = stages[0].run(batch, None)
    received = hidden.detach().requires_grad_()
    stages[1].run(batch, received).square().sum().backward()
    hidden.backward(received.grad)
    found = {name: parameter.grad for name, parameter in network.named_parameters()}
    whole = deepcopy(network)
    whole.zero_grad()
    hidden_states(whole, batch).square().sum().backward()
    for name, parameter in whole.named_parameters():
        if parameter.grad is not None:
            torch.testing.assert_close(found[name], parameter.grad)


def test_weights_of_other_stages_take_no_memory_and_keep_names_and_shapes() -> None:
    network = tiny_llama(tied=False)
    shapes = {name: parameter.shape for name, parameter in network.named_parameters()}
    stages = make_stages(find_layout(network), [1, 1])
    drop_others(stages, [1])
    assert {name: parameter.shape for name, parameter in network.named_parameters()} == shapes
    here = {name for name, parameter in network.named_parameters() if not parameter.is_meta}
    assert here == {name for name in shapes if "layers.1." in name or name in ("model.norm.weight", "lm_head.weight")}
    assert vocabulary_size(network) == len(output_head(network).weight) == 320
    assert sum(parameter.numel() for parameter in stages[1].parameters()) == sum(
        network.get_parameter(name).numel() for name in here
    )


@pytest.mark.parametrize("make", [tiny_llama, tiny_gpt2])
def test_a_tied_head_stays_with_both_ends(make: type[nn.Module]) -> None:
    for index in (0, 1):
        network = make()
        stages = make_stages(find_layout(network), [1, 1])
        ((module, name),) = shared_between(*stages, in_last=index == 1)
        assert module in set(stages[index].modules())
        assert module.get_parameter(name) is output_head(network).weight
        drop_others(stages, [index])
        assert not output_head(network).weight.is_meta
        assert output_head(network).weight is network.get_input_embeddings().weight  # type: ignore[operator]


def test_a_network_that_hands_on_more_than_hidden_states_is_refused() -> None:
    class Remembering(nn.Module):
        """Its last layer adds what went into the first."""

        def __init__(self) -> None:
            super().__init__()
            self.tokens = nn.Embedding(40, 8)
            self.layers = nn.ModuleList([nn.Linear(8, 8) for _ in range(2)])
            self.out = nn.Linear(8, 40)

        def forward(self, input_ids: Tensor, position_ids: Tensor) -> Tensor:
            hidden = first = self.tokens(input_ids)
            for layer in self.layers:
                hidden = layer(hidden)
            return hidden + first

    layout = find_layout(OwnNetwork(Remembering(), "out"))
    with pytest.raises(ValueError, match="cannot be cut into stages: more than hidden states"):
        check_composition(layout, make_stages(layout, [1, 1]))
