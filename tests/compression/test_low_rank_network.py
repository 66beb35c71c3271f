from __future__ import annotations

from collections.abc import Sequence
from copy import deepcopy

import pytest
import torch
from own_networks import Transformer
from peft import LoraConfig, get_peft_model
from tiny_architectures import tiny_architecture
from tiny_networks import tiny_llama, tiny_qwen2
from tiny_run import VOCABULARY, tiny_batches
from torch import Tensor, nn

from lightllm.batch import TextBatch
from lightllm.compression.factored_linear import FactoredLinear
from lightllm.compression.low_rank import spectrum
from lightllm.compression.low_rank_network import (
    LowRank,
    decomposable_layers,
    decompose,
    factored_layers,
    rank_report,
)
from lightllm.compression.rank_choice import RankChoice, Shape
from lightllm.models.anatomy import OwnNetwork
from lightllm.models.hidden_states import hidden_states

LAYERS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def inputs_of(network: nn.Module, name: str, batches: Sequence[TextBatch]) -> Tensor:
    """All rows `[positions, in]` that come into a layer, padding left out."""
    rows: list[Tensor] = []
    hook = network.get_submodule(name).register_forward_pre_hook(lambda _, inputs: rows.append(inputs[0]))
    with torch.no_grad():
        for batch in batches:
            hidden_states(network, batch)
    hook.remove()
    return torch.cat([one[batch["document_ids"] >= 0] for one, batch in zip(rows, batches, strict=True)])


def energy_left_out(parts: Tensor, rank: int) -> float:
    return float(parts[rank:].square().sum())


def test_plain_thin_matrices_are_the_layers_best_of_their_rank() -> None:
    network = tiny_qwen2()
    whole = deepcopy(network)
    ranks = decompose(network, decomposable_layers(network), RankChoice(budget=0.6))
    assert len(ranks) == 14
    for name, rank in ranks.items():
        thin, layer = network.get_submodule(name), whole.get_submodule(name)
        assert isinstance(thin, FactoredLinear)
        assert isinstance(layer, nn.Linear)
        assert rank == thin.rank == int(0.6 * layer.weight.numel() / sum(layer.weight.shape))
        left, values, right = torch.linalg.svd(layer.weight.detach(), full_matrices=False)
        best = (left[:, :rank] * values[:rank]) @ right[:rank]
        torch.testing.assert_close(thin.up.weight @ thin.down.weight, best, atol=1e-5, rtol=1e-4)
        if layer.bias is not None:
            assert torch.equal(thin.up.bias, layer.bias)
    assert {name for name, _ in network.named_modules() if name.endswith(LAYERS)} == set(ranks)


def test_each_block_is_fitted_to_what_the_thin_blocks_before_it_give() -> None:
    network = tiny_llama(VOCABULARY)
    whole, batches = deepcopy(network), tiny_batches(6)
    ranks = decompose(network, decomposable_layers(network), RankChoice(budget=0.6), batches)
    names = [f"model.layers.{block}.{layer}" for block in (0, 1) for layer in ("self_attn.q_proj", "mlp.up_proj")]
    half = deepcopy(whole)  # the first block thin, the second whole
    half.model.layers[0] = network.model.layers[0]
    for name in names:
        inputs = inputs_of(whole if ".0." in name else half, name, batches).double()
        layer = whole.get_submodule(name)
        thin = network.get_submodule(name)
        assert isinstance(layer, nn.Linear)
        assert isinstance(thin, FactoredLinear)
        lost = ((layer.weight.double() - thin.up.weight.double() @ thin.down.weight.double()) @ inputs.T).square().sum()
        parts = spectrum(layer.weight, inputs.T @ inputs)
        assert lost.item() == pytest.approx(energy_left_out(parts.values, ranks[name]), rel=1e-3)
        plain = spectrum(layer.weight).factors(ranks[name])
        assert lost < ((layer.weight.double() - plain.up @ plain.down) @ inputs.T).square().sum()


@pytest.mark.parametrize("batches", [None, tiny_batches(4)])
def test_ranks_by_energy_are_those_of_the_whole_network(batches: list[TextBatch] | None) -> None:
    network = tiny_llama(VOCABULARY)
    whole = deepcopy(network)
    ranks = decompose(network, decomposable_layers(network), RankChoice(energy=0.6), batches)
    assert len(set(ranks.values())) > 1
    for name in decomposable_layers(whole):
        layer = whole.get_submodule(name)
        assert isinstance(layer, nn.Linear)
        moment = None
        if batches is not None:
            inputs = inputs_of(whole, name, batches).double()
            moment = inputs.T @ inputs
        squares = spectrum(layer.weight, moment).values.square()
        rank = next(rank for rank in range(1, 33) if squares[:rank].sum() >= 0.6 * squares.sum())
        saves = rank * sum(layer.weight.shape) < layer.weight.numel()
        assert ranks.get(name) == (rank if saves else None)


def test_a_global_budget_is_kept_and_used() -> None:
    network = tiny_llama(VOCABULARY)
    whole = {name: Shape(*layer.weight.shape) for name, layer in decomposable_layers(network).items()}
    decompose(network, decomposable_layers(network), RankChoice(budget=0.5, allocation="global"), tiny_batches(4))
    thin = factored_layers(network)
    spent = sum(
        sum(parameter.numel() for parameter in thin[name].parameters()) if name in thin else shape.num_parameters
        for name, shape in whole.items()
    )
    total = sum(shape.num_parameters for shape in whole.values())
    assert 0.45 * total < spent <= 0.5 * total
    assert len({layer.rank for layer in thin.values()}) > 1


@pytest.mark.parametrize("architecture", ["llama", "gemma3_text", "gpt_neox", "phi3", "olmo2", "opt"])
def test_architectures_without_conv1d_run_in_thin_matrices(architecture: str) -> None:
    network = tiny_architecture(architecture, dtype="float32")
    batch = tiny_batches(1)[0]
    before = hidden_states(network, batch)
    decompose(network, decomposable_layers(network), RankChoice(budget=0.9), tiny_batches(4))
    after = hidden_states(network, batch)
    assert after.isfinite().all()
    assert 0 < (after - before).norm() < before.norm()


def test_a_module_of_ones_own_runs_in_thin_matrices() -> None:
    network = OwnNetwork(Transformer(VOCABULARY), "lm_head").eval()
    with pytest.raises(ValueError, match=r"out_proj is a NonDynamicallyQuantizableLinear, and only nn.Linear"):
        decomposable_layers(network)
    batches = tiny_batches(4)
    before = hidden_states(network, batches[0])
    ranks = decompose(network, decomposable_layers(network, ["out_proj"]), RankChoice(budget=0.8), batches)
    assert set(ranks) == {"module.layers.0.linear1", "module.layers.0.linear2"}
    with torch.no_grad():
        assert 0 < (hidden_states(network, batches[0]) - before).norm() < before.norm()


@pytest.mark.parametrize("calibrated", [False, True])
def test_it_is_repeated_by_its_record_without_data(calibrated: bool) -> None:
    batches = tiny_batches(4)
    first = LowRank("low", RankChoice(energy=0.6), ["k_proj"], (lambda: batches) if calibrated else None)
    network, again = tiny_llama(VOCABULARY), tiny_llama(VOCABULARY)
    record = first.apply(network, None)
    assert set(record) == {"ranks"}
    assert not any("k_proj" in name for name in record["ranks"])

    def no_data() -> list[TextBatch]:
        raise AssertionError("asked for data")

    second = LowRank("low", RankChoice(energy=0.6), ["k_proj"], no_data)
    assert second.apply(again, record) == record
    again.load_state_dict(network.state_dict())
    batch = batches[0]
    assert torch.equal(hidden_states(network, batch), hidden_states(again, batch))
    assert second.changes_frozen_weights


def test_the_report_counts_layers_and_weights() -> None:
    network = tiny_llama()
    decompose(network, decomposable_layers(network, ["k_proj", "v_proj"]), RankChoice(by_layer={"mlp": 10, "": 8}))
    report = rank_report(network)
    thin = sum(p.numel() for layer in factored_layers(network).values() for p in layer.parameters())
    assert (report.num_factored, report.num_whole, report.ranks) == (10, 4, (8, 10))
    assert report.parameters_after == thin == 2 * (2 * 8 * 64 + 3 * 10 * 80)
    assert report.parameters_before == 2 * (2 * 32 * 32 + 3 * 32 * 48)
    assert report.describe().startswith("low rank: 10 layers of 0.01331M weights are two thin matrices of 0.006848M")
    adapted = get_peft_model(network, LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM"))
    assert rank_report(adapted) == report
    with pytest.raises(ValueError, match="no layer of the network"):
        rank_report(tiny_llama())


def test_what_cannot_be_taken_apart_is_refused() -> None:
    network = tiny_llama()
    with pytest.raises(ValueError, match="at no layer would two thin matrices be smaller"):
        decompose(network, decomposable_layers(network), RankChoice(energy=0.9999))
    assert not factored_layers(network)
    with pytest.raises(ValueError, match=r"GPT-2's Conv1D are none"):
        decomposable_layers(tiny_architecture("gpt2", dtype="float32"))
    adapted = get_peft_model(network, LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM"))
    with pytest.raises(ValueError, match=r"only nn.Linear with a weight of ordinary numbers"):
        decomposable_layers(adapted)
