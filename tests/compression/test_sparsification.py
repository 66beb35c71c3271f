from __future__ import annotations

import pytest
import torch
from tiny_networks import tiny_llama, token_rows
from torch import Tensor, nn

from lightllm.compression.effective_weight import EffectiveLayer, FixedMask
from lightllm.compression.effects import effective_layers, mask_layers
from lightllm.compression.hard_concrete import ColumnGates
from lightllm.compression.low_rank_network import decomposable_layers, decompose
from lightllm.compression.rank_choice import RankChoice
from lightllm.compression.sparsification import L1, GroupLasso, HardConcrete, Sparsifying, Sparsity
from lightllm.export.compare import outputs
from lightllm.export.merge import merged_weights
from lightllm.models import LoRA
from lightllm.models.anatomy import unwrapped

LAYERS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def sparse(sparsity: Sparsity, leave_out: list[str] | None = None, adapter: LoRA | None = None) -> nn.Module:
    network: nn.Module = tiny_llama()
    if adapter is not None:
        network = adapter.attach(network)
        for parameter in network.parameters():
            if parameter.requires_grad:
                nn.init.normal_(parameter, std=0.1)
    Sparsifying("sparsity", sparsity, leave_out or []).apply(network, None)
    return network


def merged(layer: EffectiveLayer) -> Tensor:
    """`W + s B A` with its gradients, as its definition says."""
    factors = dict(layer.named_parameters())  # type: ignore[attr-defined]
    if "lora_A.default.weight" not in factors:
        return layer.base.weight
    scale = layer.scaling["default"]  # type: ignore[attr-defined]
    return layer.base.weight + scale * factors["lora_B.default.weight"] @ factors["lora_A.default.weight"]


def neurons(network: nn.Module, block: int) -> list[Tensor]:
    gate, up, down = (
        merged(effective_layers(network)[f"model.layers.{block}.mlp.{name}_proj"]) for name in ("gate", "up", "down")
    )
    return [torch.cat([gate[index], up[index], down[:, index]]) for index in range(48)]


def plain(network: nn.Module, sparsity: Sparsity) -> Tensor:
    """The penalty by its formula."""
    if isinstance(sparsity, L1):
        return torch.stack([merged(layer).abs().sum() for layer in effective_layers(network).values()]).sum()
    assert isinstance(sparsity, GroupLasso)
    total = torch.zeros(())
    if "neurons" in sparsity.over:
        total = total + sum(96**0.5 * unit.norm() for block in (0, 1) for unit in neurons(network, block))
    if "rows" in sparsity.over:
        for layer in effective_layers(network).values():
            total = total + sum(len(row) ** 0.5 * row.norm() for row in merged(layer))
    return total


@pytest.mark.parametrize("adapter", [None, LoRA(rank=2, alpha=6)])
@pytest.mark.parametrize(
    "sparsity", [L1(), GroupLasso(["rows"]), GroupLasso(["neurons"]), GroupLasso(["neurons", "rows"])]
)
def test_gradients_reach_whatever_trains(sparsity: Sparsity, adapter: LoRA | None) -> None:
    network = sparse(sparsity, adapter=adapter)
    expected = 0.3 * plain(network, sparsity)
    trained = {name: one for name, one in network.named_parameters() if one.requires_grad}
    by_autograd = torch.autograd.grad(expected, list(trained.values()), allow_unused=True)
    for parameter in trained.values():  # the loss has left gradients
        parameter.grad = torch.ones_like(parameter)
    value = sparsity.sparsifier(network, []).add_gradient(0.3)
    torch.testing.assert_close(0.3 * value, expected.detach())
    for (name, parameter), gradient in zip(trained.items(), by_autograd, strict=True):
        expected_gradient = torch.ones_like(parameter) + (0 if gradient is None else gradient)
        torch.testing.assert_close(parameter.grad, expected_gradient, msg=name, atol=1e-5, rtol=1e-4)
    assert adapter is None or all(one.grad is None for one in network.parameters() if not one.requires_grad)


def test_gates_get_the_gradient_of_their_expected_number() -> None:
    sparsity = HardConcrete(["neurons", "heads"])
    network = sparse(sparsity)
    own = sparsity.own_parameters(network)
    assert [len(one) for one in own] == [2, 48] * 2
    for one in own:
        nn.init.normal_(one)
        one.grad = torch.ones_like(one)
    probabilities = [torch.sigmoid(one - 2 / 3 * torch.log(torch.tensor(0.1 / 1.1))) for one in own]
    expected = torch.autograd.grad(sum(one.sum() for one in probabilities), own)
    value = sparsity.sparsifier(network, []).add_gradient(0.3)
    torch.testing.assert_close(value, torch.cat(probabilities).sum().detach())
    for one, gradient in zip(own, expected, strict=True):
        torch.testing.assert_close(one.grad, 1 + 0.3 * gradient)


@pytest.mark.parametrize("adapter", [None, LoRA(rank=2)])
def test_single_weights_below_the_threshold_are_zero_in_an_export(adapter: LoRA | None) -> None:
    network = sparse(L1(), ["o_proj"], adapter)
    sparsifier = L1().sparsifier(network, ["o_proj"])
    before = dict(merged_weights(network))
    share = sparsifier.share(0.1)
    sparsifier.zero(0.1)
    after = dict(merged_weights(network))
    zeros = 0
    for name, weight in before.items():
        chosen = name.removesuffix(".weight").endswith(LAYERS) and "o_proj" not in name
        expected = torch.where(weight.abs() > 0.1, weight, 0) if chosen else weight
        torch.testing.assert_close(after[name], expected)
        zeros += int((expected == 0).sum()) if chosen else 0
    assert share == (zeros, 2 * (3 * 32 * 48 + 32 * 32 + 2 * 16 * 32))
    assert 0.1 < zeros / share.num_all < 0.9
    assert sparsifier.share(0.0).num_zero == zeros


def test_whole_neurons_become_zero() -> None:
    sparsity = GroupLasso(["neurons"])
    network = sparse(sparsity)
    assert {name.split(".")[-1] for name in effective_layers(network)} == {"gate_proj", "up_proj", "down_proj"}
    sparsifier = sparsity.sparsifier(network, [])
    sizes = torch.stack([unit.square().mean().sqrt() for block in (0, 1) for unit in neurons(network, block)]).detach()
    threshold = float(sizes.sort().values[47:49].mean())
    sparsifier.zero(threshold)
    left = torch.stack([unit.abs().sum() for block in (0, 1) for unit in neurons(network, block)])
    assert torch.equal(left == 0, sizes <= threshold)
    assert int((left == 0).sum()) == 48


@pytest.mark.parametrize("adapter", [None, LoRA(rank=2)])
def test_gates_are_folded_into_the_weights_and_closed_units_are_gone(adapter: LoRA | None) -> None:
    sparsity = HardConcrete(["neurons", "heads"])
    network = sparse(sparsity, adapter=adapter).eval()
    gates = {
        name: layer.effect.masking
        for name, layer in effective_layers(network).items()
        if isinstance(layer.effect.masking, ColumnGates)
    }
    generator = torch.Generator().manual_seed(0)
    for one in gates.values():
        nn.init.normal_(one.logits, std=2.0, generator=generator)
    before = outputs(network, token_rows())
    weights = dict(merged_weights(network))
    ungated = dict(effective_layers(network))["model.layers.0.mlp.down_proj"].merged_weight()
    settled = gates["model.layers.0.mlp.down_proj"].gates
    torch.testing.assert_close(weights["model.layers.0.mlp.down_proj.weight"], ungated * settled)
    folded = tiny_llama()
    folded.load_state_dict(weights)
    torch.testing.assert_close(outputs(folded, token_rows()), before, atol=1e-4, rtol=1e-4)

    sparsifier = sparsity.sparsifier(network, [])
    closed = sum(int((one.gates <= 0.05).sum()) for one in gates.values())
    assert sparsifier.share(0.05) == (closed, 100)
    sparsifier.zero(0.05)
    assert sparsifier.share(0.0) == (closed, 100)
    weights = dict(merged_weights(network))
    dead = settled <= 0.05
    assert 5 < int(dead.sum()) < 43
    mlp = "model.layers.0.mlp"
    assert not weights[f"{mlp}.down_proj.weight"][:, dead].any()
    assert not weights[f"{mlp}.up_proj.weight"][dead].any()
    assert not weights[f"{mlp}.gate_proj.weight"][dead].any()
    assert weights[f"{mlp}.up_proj.weight"][~dead].abs().sum(1).all()
    folded.load_state_dict(weights)
    torch.testing.assert_close(outputs(folded, token_rows()), outputs(network, token_rows()), atol=1e-4, rtol=1e-4)


def test_a_closed_head_takes_its_queries_with_it() -> None:
    sparsity = HardConcrete(["heads"])
    network = sparse(sparsity)
    attention = "model.layers.1.self_attn"
    gates = effective_layers(network)[f"{attention}.o_proj"].effect.masking
    assert isinstance(gates, ColumnGates)
    with torch.no_grad():
        gates.logits.copy_(torch.tensor([9.0, -9.0]))
    sparsity.sparsifier(network, []).zero(0.0)
    weights = dict(merged_weights(network))
    plain_weights = tiny_llama().state_dict()
    for name, dead in {"q": slice(16, 32), "k": slice(8, 16), "v": slice(8, 16)}.items():
        weight = weights[f"{attention}.{name}_proj.weight"]
        assert not weight[dead].any()
        assert weight[: dead.start].any()
        assert weight.shape == plain_weights[f"{attention}.{name}_proj.weight"].shape
    assert not weights[f"{attention}.o_proj.weight"][:, 16:].any()


def test_thin_matrices_are_penalised_on_their_outer_sides() -> None:
    network = tiny_llama()
    decompose(network, decomposable_layers(network), RankChoice(budget=0.8))
    sparsity = HardConcrete(["neurons"])
    sparsity.install(network, [])
    masks = {
        name.removeprefix("model.layers."): layer.effect.masking for name, layer in effective_layers(network).items()
    }
    assert isinstance(masks["0.mlp.down_proj.down"], ColumnGates)
    assert isinstance(masks["0.mlp.up_proj.up"], FixedMask)
    assert not any(name.endswith(("up_proj.down", "down_proj.up")) for name in masks)


def test_what_makes_no_sense_is_refused() -> None:
    with pytest.raises(ValueError, match="over names no groups"):
        GroupLasso([])
    with pytest.raises(ValueError, match="over names no units"):
        HardConcrete([])
    with pytest.raises(ValueError, match=r"learning_rate is 0: give one above 0"):
        HardConcrete(["heads"], learning_rate=0)
    with pytest.raises(ValueError, match=r"initial is 1: give a number above 0 and below 1"):
        HardConcrete(["heads"], initial=1)
    network = tiny_llama()
    mask_layers(network, [])
    with pytest.raises(ValueError, match=r"down_proj is masked already, and gates would be a second mask"):
        HardConcrete(["neurons"]).install(network, [])
    assert unwrapped(network) is network
