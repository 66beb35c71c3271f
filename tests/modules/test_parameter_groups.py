import pytest
from tiny_networks import tiny_gpt2, tiny_llama
from torch import nn

from lightllm.models import Frozen, LoRA
from lightllm.modules.parameter_groups import parameter_groups


def names(module: nn.Module, group: dict[str, object]) -> set[str]:
    parameters = group["params"]
    assert isinstance(parameters, list)
    return {name for name, parameter in module.named_parameters() if any(parameter is one for one in parameters)}


def test_norms_and_biases_are_not_decayed() -> None:
    network = tiny_gpt2()
    decayed, plain = parameter_groups(network)
    assert "weight_decay" not in decayed  # it is the optimizer's
    assert plain["weight_decay"] == 0.0
    expected = {name for name, _ in network.named_parameters() if name.endswith("bias") or ".ln_" in name}
    assert names(network, plain) == expected
    assert names(network, decayed) == {name for name, _ in network.named_parameters()} - expected
    assert sum(len(group["params"]) for group in (decayed, plain)) == len(list(network.parameters()))  # tied: once


def test_only_what_trains_is_in_a_group() -> None:
    network = LoRA(rank=2).attach(tiny_llama())
    (group,) = parameter_groups(network)
    assert names(network, group) == {name for name, _ in network.named_parameters() if "lora_" in name}
    assert "weight_decay" not in group
    frozen = Frozen(parameters=["proj"]).attach(tiny_llama())
    (norms,) = parameter_groups(frozen)
    assert norms["weight_decay"] == 0.0


def test_nothing_to_train_is_refused() -> None:
    with pytest.raises(ValueError, match="no parameter trains: every one is frozen"):
        parameter_groups(tiny_llama().requires_grad_(False))
