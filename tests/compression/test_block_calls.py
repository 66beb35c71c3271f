from __future__ import annotations

from typing import Any

import pytest
import torch
from tiny_architectures import tiny_architecture
from tiny_objective import cut, documents
from torch import Tensor, nn

from lightllm.batch import TextBatch
from lightllm.compression.block_calls import record_calls, run_block
from lightllm.models.anatomy import blocks
from lightllm.models.hidden_states import hidden_states


def batches() -> list[TextBatch]:
    return [*cut(documents(6), [3, 3], packed=True), *cut(documents(6, seed=2), [4, 2])]


def inputs_and_outputs(network: nn.Module, batch: TextBatch) -> list[tuple[Tensor, Tensor]]:
    """Hidden states into and out of every block, in a plain pass."""
    found: list[tuple[Tensor, Tensor]] = []

    def keep(_: nn.Module, positional: tuple[Any, ...], named: dict[str, Any], output: Any) -> None:
        states = positional[0] if positional else named["hidden_states"]
        found.append((states.clone(), (output if isinstance(output, Tensor) else output[0]).clone()))

    handles = [block.register_forward_hook(keep, with_kwargs=True) for block in blocks(network)]
    hidden_states(network, batch)
    for handle in handles:
        handle.remove()
    return found


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "gemma3_text", "bloom", "mixtral"])
@torch.no_grad()
def test_a_block_called_by_itself_computes_what_it_does_in_the_network(architecture: str) -> None:
    network = tiny_architecture(architecture)
    first, calls = record_calls(network, list(blocks(network)), batches())
    for number, batch in enumerate(batches()):
        expected = inputs_and_outputs(network, batch)
        assert torch.equal(first[number], expected[0][0])
        states = first[number]
        for block, of_block, (before, after) in zip(blocks(network), calls, expected, strict=True):
            torch.testing.assert_close(states, before)
            states = run_block(block, states, of_block[number])
            torch.testing.assert_close(states, after)
        assert torch.equal(first[number], expected[0][0]), "what went in stays as it was"


@torch.no_grad()
def test_blocks_compute_for_the_first_batch_only() -> None:
    network = tiny_architecture("llama")
    computed = 0

    def count(*_: Any) -> None:
        nonlocal computed
        computed += 1

    blocks(network)[1].get_submodule("mlp").register_forward_hook(count)
    record_calls(network, list(blocks(network)), batches())
    assert computed == 1
    hidden_states(network, batches()[0])
    assert computed == 2, "and compute again afterwards"
    assert all("forward" not in vars(block) for block in blocks(network))


class Told(nn.Module):
    """A block that is told how large hidden states were in the first of all."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.block = block

    def forward(self, states: Tensor, told: Tensor, **named: Any) -> Tensor:
        output: Any = self.block(states, **named)
        return (output if isinstance(output, Tensor) else output[0]) * told


@torch.no_grad()
def test_what_depends_on_earlier_blocks_is_recorded_in_full_passes() -> None:
    network = tiny_architecture("llama")
    stack = blocks(network)
    plain = stack[1]
    stack[1] = Told(plain)
    size: list[Tensor] = []
    stack[0].register_forward_hook(lambda _, __, output: size.append(output.std()))
    stack[1].register_forward_pre_hook(lambda _, x, named: (x, {**named, "told": size[-1]}), with_kwargs=True)
    _, calls = record_calls(network, list(stack), batches())
    for number, batch in enumerate(batches()):
        expected = inputs_and_outputs(network, batch)[0][1].std()
        assert torch.equal(calls[1][number].named["told"], expected)


@torch.no_grad()
def test_a_forward_of_a_blocks_own_comes_back() -> None:
    network = tiny_architecture("llama")
    block = blocks(network)[0]
    original = block.forward
    block.forward = lambda *positional, **named: original(*positional, **named)  # type: ignore[method-assign]
    own = block.forward
    record_calls(network, list(blocks(network)), batches())
    assert block.forward is own
