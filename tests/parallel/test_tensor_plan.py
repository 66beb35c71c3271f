from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from own_networks import Gru
from parity import whole
from ranks import run_on_ranks
from tiny_architectures import VOCABULARY, tiny_architecture
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor

from lightllm.batch import TextBatch
from lightllm.losses import linear_cross_entropy
from lightllm.models import LoRA
from lightllm.models.anatomy import OwnNetwork, output_head
from lightllm.models.hidden_states import hidden_states
from lightllm.parallel.tensor_plan import split_layers

Build = Callable[[], nn.Module]


def batch() -> TextBatch:
    """Two packed documents a row; tokens from all over the vocabulary, the padding token 0 among them."""
    tokens = torch.randint(VOCABULARY - 1, (2, 13), generator=torch.Generator().manual_seed(5))
    tokens[0, 3] = 0
    positions = torch.cat([torch.arange(5), torch.arange(7)]).repeat(2, 1)
    return TextBatch(
        input_ids=tokens[:, :-1], labels=tokens[:, 1:], position_ids=positions, document_ids=torch.zeros_like(positions)
    )


def loss_and_gradients(network: nn.Module) -> tuple[Tensor, dict[str, Tensor]]:
    loss = linear_cross_entropy(
        hidden_states(network, batch()), labels=batch()["labels"], **output_head(network)._asdict()
    )
    loss.backward()
    named = network.named_parameters()
    return loss.detach(), {name: whole(one.grad) for name, one in named if one.grad is not None}


def mesh() -> DeviceMesh:
    return init_device_mesh("cpu", (torch.distributed.get_world_size(),))


def split(network: nn.Module, plan: dict[str, str] | None) -> tuple[Tensor, dict[str, Tensor], Tensor, float]:
    split_layers(network, mesh(), plan)
    assert all(isinstance(one, DTensor) for one in network.parameters())
    numbers = sum(one.to_local().numel() for one in network.parameters() if isinstance(one, DTensor))
    loss, gradients = loss_and_gradients(network)
    with torch.no_grad():
        logits = network(input_ids=batch()["input_ids"], use_cache=False).logits
    return loss, gradients, logits, numbers / sum(one.numel() for one in network.parameters())


def llama(**fields: Any) -> Build:
    return lambda: tiny_architecture("llama", vocab_size=VOCABULARY - 1, **fields)


def with_lora(build: Build, modules_to_save: list[str] | None = None) -> Build:
    def attach() -> nn.Module:
        network = LoRA(rank=2, modules_to_save=modules_to_save).attach(build())
        for name, one in network.named_parameters():
            if "lora_B" in name:  # which is 0 at first, so that A would get no gradient
                nn.init.normal_(one, std=0.1)
        return network

    return attach


NETWORKS: dict[str, tuple[Build, float]] = {
    "untied": (llama(), 0.55),
    "tied": (llama(tie_word_embeddings=True), 0.55),
    "odd vocabulary": (lambda: tiny_architecture("llama", vocab_size=VOCABULARY), 0.8),
    "biases": (llama(attention_bias=True, mlp_bias=True), 0.55),
    "norms of heads": (lambda: tiny_architecture("qwen3", vocab_size=VOCABULARY - 1), 0.55),
    "biases of inputs": (lambda: tiny_architecture("qwen2", vocab_size=VOCABULARY - 1), 0.55),
    "capped logits": (lambda: tiny_architecture("gemma2", vocab_size=VOCABULARY - 1), 0.55),
    "lora": (with_lora(llama()), 0.6),
    "lora and a whole head": (with_lora(llama(), ["lm_head"]), 0.7),
}


@pytest.mark.parametrize("name", NETWORKS)
def test_split_networks_are_whole_ones(name: str) -> None:
    build, most = NETWORKS[name]
    torch.manual_seed(0)
    network = build().double()  # in which nothing but a mistake makes a difference
    one = copy.deepcopy(network)
    loss, gradients = loss_and_gradients(one)
    with torch.no_grad():
        logits = one(input_ids=batch()["input_ids"], use_cache=False).logits
    for found in run_on_ranks(split, 2, network, None):
        torch.testing.assert_close(found[0], loss)
        assert found[1].keys() == gradients.keys()
        for key, theirs in gradients.items():
            torch.testing.assert_close(
                found[1][key], theirs, rtol=1e-5, atol=1e-6, msg=lambda text, key=key: f"{key}: {text}"
            )
        torch.testing.assert_close(found[2], logits, rtol=1e-4, atol=1e-5)
        assert found[3] < most  # of the numbers are on each rank


def test_a_plan_of_ones_own() -> None:
    plan = {"model.layers.*.mlp.up_proj": "colwise", "model.layers.*.mlp.gate_proj": "colwise"}
    plan["model.layers.*.mlp.down_proj"] = "rowwise"
    torch.manual_seed(0)
    network = llama()()
    loss, gradients = loss_and_gradients(copy.deepcopy(network))
    for found in run_on_ranks(split, 2, network, plan):
        torch.testing.assert_close(found[0], loss)
        torch.testing.assert_close(found[1], gradients, rtol=1e-4, atol=1e-5)


def refusal(network: nn.Module, plan: dict[str, str] | None) -> str:
    with pytest.raises(ValueError, match="tensor") as caught:
        split_layers(network, mesh(), plan)
    return str(caught.value)


def own_network() -> nn.Module:
    return OwnNetwork(Gru(20), "out")


@pytest.mark.parametrize(
    ("build", "ranks", "plan", "said"),
    [
        (
            own_network,
            2,
            None,
            "no plan of its own for tensor parallelism: give trainer.strategy.init_args.tensor_plan",
        ),
        (llama(), 2, {"model.layers.*.mlp.up": "colwise"}, "'model.layers.*.mlp.up', and LlamaForCausalLM has no such"),
        (llama(), 2, {"model.layers.*.mlp.up_proj": "sideways"}, "by 'sideways', which is not known here: colwise,"),
        (llama(), 3, None, "out_features 32, which cannot be split over 3 ranks: lower tensor"),
        (llama(), 4, None, "num_key_value_heads is 2, which cannot be split over 4 ranks: lower tensor"),
    ],
)
def test_what_cannot_be_split_is_refused(build: Build, ranks: int, plan: dict[str, str] | None, said: str) -> None:
    for found in run_on_ranks(refusal, ranks, build(), plan):
        assert said in found
