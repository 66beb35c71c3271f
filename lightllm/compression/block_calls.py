"""What a network calls its blocks with, so that each can be called again by itself."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lightllm.batch import TextBatch
from lightllm.models.anatomy import unwrapped
from lightllm.models.hidden_states import hidden_states


class BlockCall(NamedTuple):
    """What a block is called with, beside hidden states; it can differ from block to block (a sliding window)."""

    positional: tuple[Any, ...]
    named: dict[str, Any]
    hidden_name: str | None
    """The argument that takes the hidden states; None where it is the first positional one."""


def record_calls(
    network: nn.Module, stack: Sequence[nn.Module], batches: Sequence[TextBatch]
) -> tuple[list[Tensor], list[list[BlockCall]]]:
    """Find out what the first block is given, and what all are called with beside hidden states.

    Only the first batch goes through the blocks. Where what they are called with is the same if they are skipped, as
    it is unless it depends on what earlier blocks compute, they are skipped for all others.

    Returns:
        The first block's hidden states `[batch, seq, hidden]` by batch, and the calls by block and batch.

    Raises:
        ValueError: See `_calls_of`.
    """
    found = [_calls_of(network, stack, batches[0])]
    with _skipped(stack, found[0].lengths):
        skippable = _same(_calls_of(network, stack, batches[0]).calls, found[0].calls)
    with _skipped(stack, found[0].lengths) if skippable else nullcontext():
        found += [_calls_of(network, stack, batch) for batch in batches[1:]]
    return [one.first[0] for one in found], [list(calls) for calls in zip(*(one.calls for one in found), strict=True)]


class _Pass(NamedTuple):
    """What one batch's pass through the network looks like from the blocks."""

    first: list[Tensor]
    """What the first block is given, `[batch, seq, hidden]`; one tensor."""
    calls: list[BlockCall]
    """By block."""
    lengths: list[int | None]
    """How many values each block returns as a tuple; None for a tensor alone."""


def _calls_of(network: nn.Module, stack: Sequence[nn.Module], batch: TextBatch) -> _Pass:
    """Watch the blocks while the network runs on a batch.

    Raises:
        ValueError: The blocks are not called once each, in order, each with what the one before gave.
    """
    found = _Pass([], [], [])
    given: list[Tensor] = []

    def broken(what: str) -> ValueError:
        name = type(unwrapped(network)).__name__
        return ValueError(f"{name} {what}, so it can't be calibrated block by block: prune it by magnitude instead")

    def before(index: int) -> Callable[..., None]:
        def hook(_: nn.Module, positional: tuple[Any, ...], named: dict[str, Any]) -> None:
            states, call = _split_call(positional, named)
            if states is None:
                raise broken("calls its blocks without hidden states")
            if len(found.calls) != index:
                raise broken("does not call its blocks once each, in order")
            if index and not any(states is one or torch.equal(states, one) for one in given):
                raise broken("does something to hidden states between its blocks")
            if not index:
                found.first.append(states.clone())
            given.clear()
            found.calls.append(call)

        return hook

    def after(_: nn.Module, __: Any, output: Any) -> None:
        given[:] = [_states_of(output)]
        found.lengths.append(None if isinstance(output, Tensor) else len(output))

    with ExitStack() as hooks:
        for index, block in enumerate(stack):
            hooks.callback(block.register_forward_pre_hook(before(index), with_kwargs=True).remove)
            hooks.callback(block.register_forward_hook(after).remove)
        hidden_states(network, batch)
    if len(found.calls) != len(stack):
        raise broken("does not call every one of its blocks")
    return found


@contextmanager
def _skipped(stack: Sequence[nn.Module], lengths: Sequence[int | None]) -> Iterator[None]:
    """Within it, blocks give what they are given, in the form of what they return."""
    own = [vars(block).get("forward") for block in stack]
    try:
        for block, length in zip(stack, lengths, strict=True):
            block.forward = partial(_pass_on, length)
        yield
    finally:
        for block, forward in zip(stack, own, strict=True):
            del block.forward  # its class has it still
            if forward is not None:
                block.forward = forward


def _pass_on(length: int | None, *positional: Any, **named: Any) -> Any:
    states, _ = _split_call(positional, named)
    return states if length is None else (states, *[None] * (length - 1))


def _same(one: Any, other: Any) -> bool:
    """Whether two calls are alike, down to the values of tensors."""
    if isinstance(one, Tensor) and isinstance(other, Tensor):
        return one.shape == other.shape and one.dtype == other.dtype and torch.equal(one, other)
    if isinstance(one, (tuple, list)) and isinstance(other, (tuple, list)):
        return len(one) == len(other) and all(map(_same, one, other))
    if isinstance(one, dict) and isinstance(other, dict):
        return one.keys() == other.keys() and all(_same(one[name], other[name]) for name in one)
    return one is other or (isinstance(one, (str, int, float)) and one == other)


def _split_call(positional: tuple[Any, ...], named: dict[str, Any]) -> tuple[Tensor | None, BlockCall]:
    if positional and isinstance(positional[0], Tensor):
        return positional[0], BlockCall(positional[1:], dict(named), None)
    rest = {name: value for name, value in named.items() if name != "hidden_states"}
    return named.get("hidden_states"), BlockCall(positional, rest, "hidden_states")


def run_block(block: nn.Module, states: Tensor, call: BlockCall) -> Tensor:
    """What a block makes of hidden states, which stay as they are though some blocks add to them in place."""
    states = states.clone()
    if call.hidden_name is None:
        return _states_of(block(states, *call.positional, **call.named))
    return _states_of(block(*call.positional, **call.named, **{call.hidden_name: states}))


def _states_of(output: Any) -> Tensor:
    states = output if isinstance(output, Tensor) else output[0]
    assert isinstance(states, Tensor)
    return states
