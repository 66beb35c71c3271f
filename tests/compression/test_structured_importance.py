from __future__ import annotations

from copy import deepcopy
from typing import Any

import pytest
import torch
from tiny_architectures import tiny_architecture
from tiny_run import tiny_batches
from torch import Tensor, nn
from transformers import PreTrainedModel

from lightllm.batch import Document, TextBatch, pack_documents
from lightllm.compression.structure import structure_of
from lightllm.compression.structured_importance import (
    Importance,
    Scores,
    activation_scores,
    magnitude_scores,
    norm_factors,
    scores,
    taylor_scores,
)

HEADS, QUERIES, NEURONS, CHANNELS, LAYERS = 2, 2, 48, 32, 2
ARCHITECTURES = ["llama", "qwen2", "qwen3"]


def network_of(architecture: str, **fields: Any) -> PreTrainedModel:
    biases = {"llama": {"attention_bias": True, "mlp_bias": True}}.get(architecture, {})
    return tiny_architecture(architecture, **biases, **fields)


def documents() -> list[Document]:
    generator = torch.Generator().manual_seed(3)
    made = []
    for index, length in enumerate((9, 4, 12, 6)):
        tokens = torch.randint(97, (length,), generator=generator)
        made.append(Document(tokens, torch.rand(length, generator=generator) < 0.7, index))
    return made


def packed() -> list[TextBatch]:
    """Two batches of two documents and padding."""
    one, two, three, four = documents()
    return [pack_documents([[one, two]], length=20), pack_documents([[three], [four]], length=14)]


def assert_same(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected.double(), rtol=1e-4, atol=1e-6)


class Inputs:
    """What went into some modules, `[tokens, width]`, over documents that are read one by one, unpacked."""

    def __init__(self, network: PreTrainedModel, *names: str) -> None:
        seen: dict[str, list[Tensor]] = {name: [] for name in names}
        handles = [
            network.get_submodule(name).register_forward_pre_hook(
                lambda _, inputs, name=name: seen[name].append(inputs[0][0].detach())
            )
            for name in names
        ]
        for document in documents():
            network(torch.as_tensor(document.input_ids)[None, :-1], use_cache=False)
        for handle in handles:
            handle.remove()
        self.of = {name: torch.cat(values) for name, values in seen.items()}


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_activations_are_those_of_every_token_alone(architecture: str) -> None:
    network = network_of(architecture)
    found = activation_scores(structure_of(network), packed())
    for index in range(LAYERS):
        layer, name = network.model.layers[index], f"model.layers.{index}"
        following = f"model.layers.{index + 1}" if index + 1 < LAYERS else "model.norm"
        inputs = Inputs(network, name, following, f"{name}.self_attn.o_proj", f"{name}.mlp").of
        before, after = inputs[name], inputs[following]
        cosines = (before * after).sum(-1) / before.norm(dim=-1) / after.norm(dim=-1)
        assert_same(found.layers[index], 1 - cosines.mean())

        weight = layer.self_attn.o_proj.weight
        width = weight.shape[1] // HEADS
        for head in range(HEADS):
            part = slice(head * width, (head + 1) * width)
            added = inputs[f"{name}.self_attn.o_proj"][:, part] @ weight[:, part].T
            assert_same(found.heads[index, head], added.norm(dim=-1).mean().detach())

        mlp, read = layer.mlp, inputs[f"{name}.mlp"]
        activations = nn.functional.silu(mlp.gate_proj(read)) * mlp.up_proj(read)
        for neuron in range(NEURONS):
            added = activations[:, [neuron]] * mlp.down_proj.weight[:, neuron]
            assert_same(found.neurons[index, neuron], added.norm(dim=-1).mean().detach())


def test_channels_are_measured_behind_every_norm() -> None:
    network = network_of("llama")
    found = activation_scores(structure_of(network), packed()).channels
    names = [f"model.layers.{i}.{part}" for i in range(LAYERS) for part in ("self_attn.q_proj", "mlp.up_proj")]
    inputs = Inputs(network, *names, "lm_head").of  # what reads the output of each norm
    assert_same(found, sum((values.abs().mean(0) for values in inputs.values()), torch.zeros(CHANNELS)))


def plain_sums(network: PreTrainedModel, elements: dict[str, Tensor], tied: bool) -> Scores:
    """Sum numbers of all parameters' elements over units, unit by unit."""
    result = Scores(
        *(torch.zeros(shape).double() for shape in ((LAYERS,), (LAYERS, HEADS), (LAYERS, NEURONS), (CHANNELS,)))
    )
    for index in range(LAYERS):
        own = {name.split(f"layers.{index}.")[1]: one for name, one in elements.items() if f"layers.{index}." in name}
        result.layers[index] = sum(float(one.sum()) for one in own.values())
        for head in range(HEADS):
            for query in range(head * QUERIES, (head + 1) * QUERIES):
                rows = slice(query * 8, (query + 1) * 8)
                for name in ("self_attn.q_proj.weight", "self_attn.q_proj.bias"):
                    result.heads[index, head] += float(own[name][rows].sum())
                result.heads[index, head] += float(own["self_attn.o_proj.weight"][:, rows].sum())
            rows = slice(head * 8, (head + 1) * 8)
            for kind in "kv":
                for name in ("weight", "bias"):
                    result.heads[index, head] += float(own[f"self_attn.{kind}_proj.{name}"][rows].sum())
        for neuron in range(NEURONS):
            total = own["mlp.down_proj.weight"][:, neuron].sum()
            for name in ("gate_proj", "up_proj"):
                total = total + own[f"mlp.{name}.weight"][neuron].sum() + own[f"mlp.{name}.bias"][neuron]
            result.neurons[index, neuron] = float(total)
        for name, one in own.items():
            if "o_proj" in name or "down_proj" in name:  # channels are rows of what writes to the stream
                result.channels.add_(one.double().flatten(1).sum(1) if one.ndim == 2 else one.double())
            elif one.ndim == 2 or "layernorm" in name:
                result.channels.add_(one.double().sum(0) if one.ndim == 2 else one.double())
    for name in ["model.embed_tokens.weight"] + ([] if tied else ["lm_head.weight"]):
        result.channels.add_(elements[name].double().sum(0))
    result.channels.add_(elements["model.norm.weight"].double())
    return result


@pytest.mark.parametrize("tied", [True, False])
def test_magnitude_is_the_sum_of_squares(tied: bool) -> None:
    network = network_of("llama", tie_word_embeddings=tied)
    squares = {name: one.detach() ** 2 for name, one in network.named_parameters()}
    for found, expected in zip(
        magnitude_scores(structure_of(network)), plain_sums(network, squares, tied), strict=True
    ):
        assert_same(found, expected)


@pytest.mark.parametrize("tied", [True, False])
def test_taylor_is_weight_times_gradient_of_each_batchs_mean_loss(tied: bool) -> None:
    network = network_of("llama", tie_word_embeddings=tied)
    found = taylor_scores(structure_of(network), packed())
    one, two, three, four = documents()
    mean = {name: torch.zeros_like(parameter) for name, parameter in network.named_parameters()}
    for batch in ([one, two], [three, four]):
        losses = []
        for document in batch:  # read alone
            tokens = torch.as_tensor(document.input_ids)
            log_p = network(tokens[None, :-1], use_cache=False).logits[0].log_softmax(-1)
            losses.append(-log_p[torch.arange(len(tokens) - 1), tokens[1:]][torch.as_tensor(document.targets)[1:]])
        torch.cat(losses).mean().backward()
        for name, parameter in network.named_parameters():
            assert parameter.grad is not None
            mean[name] += (parameter * parameter.grad).abs().detach() / 2
        network.zero_grad()
    for ours, expected in zip(found, plain_sums(network, mean, tied), strict=True):
        assert_same(ours, expected)


@pytest.mark.parametrize("importance", ["activation", "taylor", "magnitude"])
def test_measuring_leaves_the_network_as_it_was(importance: Importance) -> None:
    network = network_of("qwen3").train().requires_grad_(False)
    network.model.norm.weight.requires_grad_(True)
    before, numbers = deepcopy(network.state_dict()), torch.get_rng_state()
    scores(structure_of(network), importance, packed())
    assert torch.equal(torch.get_rng_state(), numbers)
    assert network.training
    assert [name for name, one in network.named_parameters() if one.requires_grad] == ["model.norm.weight"]
    assert all(one.grad is None for one in network.parameters())
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())
    assert not any(module._forward_hooks for module in network.modules())


def test_padding_and_the_cut_into_batches_do_not_count() -> None:
    structure = structure_of(network_of("qwen2"))
    first, second = packed()
    wide = pack_documents([documents()], length=64)
    for one, other in zip(
        activation_scores(structure, [first, second]), activation_scores(structure, [wide]), strict=True
    ):
        assert_same(one, other)


def test_data_is_asked_for() -> None:
    structure = structure_of(network_of("llama"))
    (batch,) = tiny_batches(1, padding=8)
    for importance in ("activation", "taylor"):
        with pytest.raises(ValueError, match=f"importance by {importance} is measured on data, and there is none"):
            scores(structure, importance, [batch])  # type: ignore[arg-type]
    assert torch.equal(scores(structure, "magnitude", []).layers, magnitude_scores(structure).layers)


def test_factors_of_norms_are_those_of_least_squares() -> None:
    network = network_of("llama")
    structure = structure_of(network)
    channels = torch.tensor([0, 1, 4, 9, 10, 17, 20, 22, 30, 31])
    found = norm_factors(structure, channels, packed())
    names = [f"model.layers.{i}.{part}_layernorm" for i in range(LAYERS) for part in ("input", "post_attention")]
    inputs = Inputs(network, *names, "model.norm").of
    for factor, stream in zip(found, inputs.values(), strict=True):
        kept = stream[:, channels]
        wanted = nn.functional.rms_norm(stream, (32,), eps=1e-6)[:, channels]
        given = nn.functional.rms_norm(kept, (10,), eps=1e-6)
        solution = torch.linalg.lstsq(given.flatten()[:, None].double(), wanted.flatten()[:, None].double()).solution
        assert_same(factor, solution[0, 0])
    assert torch.equal(norm_factors(structure, torch.arange(CHANNELS), packed()), torch.ones(5).double())
    assert torch.equal(norm_factors(structure, channels, []), torch.ones(5).double())
