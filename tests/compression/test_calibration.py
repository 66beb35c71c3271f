from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy

import pytest
import torch
from peft import LoraConfig, PrefixTuningConfig, get_peft_model
from tiny_architectures import tiny_architecture
from tiny_objective import cut, documents
from torch import Tensor, nn
from typing_extensions import override

from lightllm.batch import PADDING_DOCUMENT, Document, TextBatch, pack_documents
from lightllm.compression.calibration import InputStatistics, change_layer_by_layer
from lightllm.models.anatomy import blocks, unwrapped
from lightllm.models.hidden_states import hidden_states

ARCHITECTURES = ["llama", "gpt2", "gemma3_text", "gemma2", "gpt_neox", "cohere2", "phi3", "olmo2", "deepseek_v3", "opt"]


class AllInputs(InputStatistics):
    """Every row that came in."""

    def __init__(self) -> None:
        self.rows: list[Tensor] = []

    @override
    def add(self, inputs: Tensor) -> None:
        self.rows.append(inputs.clone())

    def all(self) -> Tensor:
        return torch.cat(self.rows)


def mixed_batches() -> list[TextBatch]:
    """Packed rows with padding at their end, and padded rows of one document."""
    made = documents(12)
    packed = pack_documents([made[:3], made[3:5]], 40)
    assert (packed["document_ids"] == PADDING_DOCUMENT).any()
    return [packed, *cut(made[5:], [4, 3])]


def linear_layers(network: nn.Module) -> dict[str, nn.Module]:
    """The layers of the blocks, those that an adapter wraps included, by their names."""
    found = {}
    for index, block in enumerate(blocks(network)):
        for name, module in block.named_modules():
            takes_rows = isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D"
            adapted = "lora" in type(module).__module__ and type(module).__name__ == "Linear"
            if adapted or (takes_rows and not {"base_layer", "lora_A", "lora_B"} & set(name.split("."))):
                found[f"{index}.{name}"] = module
    return found


def inputs_of_a_plain_pass(network: nn.Module, batches: list[TextBatch]) -> dict[str, Tensor]:
    """The reference: hooks on all layers while the whole network runs, and padding picked out by hand."""
    seen: dict[str, list[Tensor]] = {}
    handles = []
    for name, layer in linear_layers(network).items():
        seen[name] = []
        handles.append(layer.register_forward_pre_hook(lambda _, inputs, name=name: seen[name].append(inputs[0])))
    with torch.no_grad():
        for batch in batches:
            hidden_states(network, batch)
    for handle in handles:
        handle.remove()
    real = torch.cat([batch["document_ids"].flatten() != PADDING_DOCUMENT for batch in batches])
    return {name: torch.cat([x.reshape(-1, x.shape[-1]) for x in inputs])[real] for name, inputs in seen.items()}


def halve(layer: nn.Module) -> None:
    """A change that is felt by all that comes after."""
    with torch.no_grad():
        layer.get_parameter("weight").mul_(0.5)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_each_block_is_measured_behind_the_changed_ones(architecture: str) -> None:
    network = tiny_architecture(architecture, dtype="float32")
    batches = mixed_batches()
    # Block by block in full passes: block b's inputs, with the blocks before it changed and it itself not yet.
    reference, expected = deepcopy(network), {}
    for index in range(len(blocks(reference))):
        layers = {name: one for name, one in linear_layers(reference).items() if name.startswith(f"{index}.")}
        now = inputs_of_a_plain_pass(reference, batches)
        expected |= {name: now[name] for name in layers}
        for layer in layers.values():
            halve(layer)
    found: dict[str, Tensor] = {}

    def change(name: str, layer: nn.Module, inputs: AllInputs) -> None:
        found[name] = inputs.all()
        halve(layer)

    change_layer_by_layer(network, batches, linear_layers(network), AllInputs, change)
    assert list(found) == list(expected)
    for name, rows in expected.items():
        torch.testing.assert_close(found[name], rows, rtol=1e-4, atol=1e-5, msg=lambda m, name=name: f"{name}: {m}")
    for ours, theirs in zip(network.parameters(), reference.parameters(), strict=True):
        assert torch.equal(ours, theirs)


def test_the_sequence_matters_in_that_test() -> None:
    network, batches = tiny_architecture("llama"), mixed_batches()
    before = inputs_of_a_plain_pass(network, batches)
    found: dict[str, Tensor] = {}

    def change(name: str, layer: nn.Module, inputs: AllInputs) -> None:
        found[name] = inputs.all()
        halve(layer)

    change_layer_by_layer(network, batches, linear_layers(network), AllInputs, change)
    assert torch.equal(found["0.mlp.down_proj"], before["0.mlp.down_proj"]), "a block is measured before it is changed"
    assert (found["1.mlp.down_proj"] - before["1.mlp.down_proj"]).abs().max() > 0.1


def test_an_adapted_network_and_only_some_layers() -> None:
    base = tiny_architecture("llama")
    network = get_peft_model(base, LoraConfig(r=2, target_modules=["q_proj", "down_proj"], init_lora_weights=False))
    batches = mixed_batches()
    expected = inputs_of_a_plain_pass(network, batches)
    layers = {name: one for name, one in linear_layers(network).items() if name.endswith(("q_proj", "1.mlp.down_proj"))}
    assert set(layers) == {"0.self_attn.q_proj", "1.self_attn.q_proj", "1.mlp.down_proj"}
    found: dict[str, Tensor] = {}
    change_layer_by_layer(
        network, batches, layers, AllInputs, lambda name, _, inputs: found.__setitem__(name, inputs.all())
    )
    assert list(found) == ["0.self_attn.q_proj", "1.self_attn.q_proj", "1.mlp.down_proj"]
    for name, rows in found.items():
        torch.testing.assert_close(rows, expected[name], rtol=1e-4, atol=1e-5)


def test_nothing_else_is_disturbed() -> None:
    network = tiny_architecture("llama", attention_dropout=0.5).train()
    blocks(network)[1].eval()
    for index, parameter in enumerate(network.parameters()):
        parameter.grad = torch.full_like(parameter, float(index))
    modes = [module.training for module in network.modules()]
    before = torch.get_rng_state()
    change_layer_by_layer(network, mixed_batches(), linear_layers(network), AllInputs, lambda *_: None)
    assert [module.training for module in network.modules()] == modes
    assert torch.equal(torch.get_rng_state(), before)
    assert all(bool((p.grad == i).all()) for i, p in enumerate(network.parameters()) if p.grad is not None)
    assert all(parameter.requires_grad for parameter in network.parameters())
    assert not any(module._forward_pre_hooks or module._forward_hooks for module in linear_layers(network).values())
    assert not any(block._forward_pre_hooks or block._forward_hooks for block in blocks(network))
    hidden_states(network, mixed_batches()[0]).sum().backward()  # training goes on


def test_nothing_stays_behind_after_an_error() -> None:
    network = tiny_architecture("llama").train()

    def fail(*_: object) -> None:
        raise RuntimeError("not this layer")

    with pytest.raises(RuntimeError, match="not this layer"):
        change_layer_by_layer(network, mixed_batches(), linear_layers(network), AllInputs, fail)
    assert all(module.training for module in network.modules())
    assert not any(module._forward_pre_hooks or module._forward_hooks for module in network.modules())


def test_the_statistics_of_one_block_are_there_at_a_time() -> None:
    network = tiny_architecture("llama", num_hidden_layers=4)
    alive, most = 0, 0

    class Counted(AllInputs):
        def __init__(self) -> None:
            super().__init__()
            nonlocal alive, most
            alive += 1
            most = max(most, alive)

        def __del__(self) -> None:
            nonlocal alive
            alive -= 1

    layers = linear_layers(network)
    change_layer_by_layer(network, mixed_batches(), layers, Counted, lambda *_: None)
    assert most == len(layers) / 4
    assert alive == 0


def test_statistics_of_a_half_precision_network_are_in_float32() -> None:
    network = tiny_architecture("llama", dtype="bfloat16")
    found: list[Tensor] = []
    change_layer_by_layer(
        network, mixed_batches(), linear_layers(network), AllInputs, lambda _, __, inputs: found.append(inputs.all())
    )
    assert {rows.dtype for rows in found} == {torch.float32}


def test_experts_get_the_tokens_that_are_routed_to_them() -> None:
    network = with_expert_lists()
    full = [pack_documents([documents(3)])]
    assert not (full[0]["document_ids"] == PADDING_DOCUMENT).any()
    found: dict[str, Tensor] = {}
    change_layer_by_layer(
        network, full, linear_layers(network), AllInputs, lambda name, _, inputs: found.__setitem__(name, inputs.all())
    )
    positions = full[0]["input_ids"].numel()
    assert len(found["0.mlp.experts.0"]) + len(found["0.mlp.experts.1"]) == positions
    with pytest.raises(ValueError, match=r"padding can't be told apart.*without padding"):
        change_layer_by_layer(network, mixed_batches(), linear_layers(network), AllInputs, lambda *_: None)


class Routed(nn.Module):
    """Two experts; the first value of a token says whose it is."""

    def __init__(self, width: int, all_to_first: bool = False) -> None:
        super().__init__()
        self.experts = nn.ModuleList([nn.Linear(width, width) for _ in range(2)])
        self.all_to_first = all_to_first

    def forward(self, states: Tensor) -> Tensor:
        rows = states.flatten(0, 1)
        second = torch.zeros(len(rows), dtype=torch.bool) if self.all_to_first else rows[:, 0] > 0
        output = torch.empty_like(rows)
        for chosen, expert in zip((~second, second), self.experts, strict=True):
            output[chosen] = expert(rows[chosen])
        return output.view_as(states)


def with_expert_lists(all_to_first: bool = False) -> nn.Module:
    network = tiny_architecture("llama")
    for block in blocks(network):
        block.mlp = Routed(32, all_to_first)
    return network


def refuse(network: nn.Module, message: str, batches: list[TextBatch] | None = None) -> None:
    with pytest.raises(ValueError, match=message):
        change_layer_by_layer(
            network, mixed_batches() if batches is None else batches, linear_layers(network), AllInputs, lambda *_: None
        )


def test_refused() -> None:
    network = tiny_architecture("llama")
    refuse(network, "at least one batch", [])
    head = {"lm_head": unwrapped(network).get_submodule("lm_head")}
    with pytest.raises(ValueError, match="'lm_head' is no layer of the network's blocks"):
        change_layer_by_layer(network, mixed_batches(), head, AllInputs, lambda *_: None)
    full = [pack_documents([documents(3)])]
    refuse(with_expert_lists(all_to_first=True), r"came into 0\.mlp\.experts\.1: calibrate on more", full)
    prefix = get_peft_model(tiny_architecture("llama"), PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2))
    refuse(prefix, "would miss what the adapter puts before every row")


def broken(change: Callable[[nn.Module], None]) -> nn.Module:
    network = tiny_architecture("llama")
    change(network)
    return network


def test_networks_that_are_no_chain_of_blocks_are_refused() -> None:
    def scale_between(network: nn.Module) -> None:
        blocks(network)[1].register_forward_pre_hook(lambda _, inputs: (inputs[0] * 2, *inputs[1:]))

    refuse(broken(scale_between), "does something to hidden states between its blocks")

    def repeat(network: nn.Module) -> None:
        blocks(network)[1] = blocks(network)[0]

    refuse(broken(repeat), "can't be calibrated block by block")

    def skip(network: nn.Module) -> None:
        network.config.num_hidden_layers = 1

    refuse(broken(skip), "does not call every one of its blocks")


def test_a_document_of_padding_only_counts_nothing() -> None:
    network = tiny_architecture("llama")
    real = pack_documents([[Document([1, 2, 3], [True] * 3, 0)]], 6)
    counted: list[int] = []
    change_layer_by_layer(
        network, [real], linear_layers(network), AllInputs, lambda _, __, inputs: counted.append(len(inputs.all()))
    )
    assert set(counted) == {2}
