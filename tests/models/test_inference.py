import pytest
import torch
from torch import nn

from lightllm.models.inference import inference, network_device, own_random_numbers


def test_modes_come_back_one_by_one_even_after_an_error() -> None:
    network = nn.Sequential(nn.Linear(2, 2), nn.Dropout(0.5)).train()
    network[0].eval()

    def fail() -> None:
        with inference(network):
            assert not any(module.training for module in network.modules())
            assert not network(torch.ones(1, 2)).requires_grad
            raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        fail()
    assert [module.training for module in network.modules()] == [True, False, True]
    assert network(torch.ones(1, 2)).requires_grad


def test_what_a_network_keeps_can_still_train_after() -> None:
    network = nn.Linear(2, 2)
    with inference(network):
        kept = torch.ones(2)
    (network(torch.ones(1, 2)) * kept).sum().backward()


def test_random_numbers_are_repeatable_and_apart() -> None:
    state = torch.get_rng_state()
    draws = []
    for seed in (3, 3, 4, None, None):
        with own_random_numbers(torch.device("cpu"), seed):
            draws.append(torch.rand(()).item())
    assert draws[0] == draws[1]
    assert len(set(draws)) == 4
    assert torch.equal(state, torch.get_rng_state())


def test_a_networks_device_is_its_parameters() -> None:
    assert network_device(nn.Linear(1, 1, device="meta")) == torch.device("meta")
