"""Hidden states of a batch: the one call of a network, for every objective, and what it must not let through."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from lightllm.batch import TextBatch
from lightllm.models.anatomy import (
    OwnNetwork,
    decoder,
    input_embedding,
    learns_a_prompt,
    unwrapped,
    vocabulary_size,
)
from lightllm.models.inference import inference, network_device


def hidden_states(network: nn.Module, batch: TextBatch) -> Tensor:
    """The last hidden state, after the final norm and before the head: `[batch, seq, hidden]`.

    No attention mask is passed and no cache made: only then does transformers keep packed documents apart, by their
    restarting positions, and only then does a row of one document take the fast causal kernel.
    """
    if learns_a_prompt(network):
        return _behind_a_learned_prompt(network, batch)
    base = unwrapped(network)
    if isinstance(base, OwnNetwork):
        return base(batch["input_ids"], batch["position_ids"])
    output = decoder(base)(input_ids=batch["input_ids"], position_ids=batch["position_ids"], use_cache=False)
    return output.last_hidden_state


def _behind_a_learned_prompt(network: nn.Module, batch: TextBatch) -> Tensor:
    """Through peft's own forward, which puts the prompt before the row: in the cache or in the embeddings.

    The head is asked for one position only, and the hidden states are read where they leave the decoder. Rows hold
    one document each, padded at the end, which a causal mask hides by itself.
    """
    captured: list[Tensor] = []
    handle = decoder(network).register_forward_hook(lambda _, __, output: captured.append(output.last_hidden_state))
    try:
        network(
            input_ids=batch["input_ids"],
            attention_mask=torch.ones_like(batch["input_ids"]),
            logits_to_keep=1,
        )
    finally:
        handle.remove()
    return captured[0][:, -batch["input_ids"].shape[1] :]


def check_causal(network: nn.Module) -> None:
    """Refuse a network whose positions see later ones, and with them the token that they are to predict.

    Raises:
        ValueError: It does: it is an encoder.
    """
    if reaches(network, torch.arange(8), source=slice(4, 8), target=slice(0, 4)):
        raise ValueError(
            f"{type(unwrapped(network)).__name__} sees the tokens that it is to predict: it is an encoder, and this "
            "objective needs a causal language model"
        )


def check_packing(network: nn.Module) -> None:
    """Refuse a network that does not keep packed documents apart: not every architecture reads its positions so.

    Raises:
        ValueError: A document's hidden states depend on the one before it in the row.
    """
    if reaches(network, torch.arange(4).repeat(2), source=slice(0, 4), target=slice(4, 8)):
        raise ValueError(
            f"{type(unwrapped(network)).__name__} does not tell packed documents apart by their positions, so each "
            "would see those before it in the row: set data.batches.mode to sorted"
        )


def reaches(
    network: nn.Module,
    positions: Tensor,
    source: slice,
    target: slice,
    states: Callable[[nn.Module, TextBatch], Tensor] = hidden_states,
) -> bool:
    """Whether hidden states at `target` depend on tokens at `source`, in a row with these positions.

    By their gradient, which is exactly 0 where they don't, in any dtype and however weak random weights are.

    Args:
        network: The network.
        positions: Positions within documents, `[seq]`.
        source: Places whose tokens may be seen.
        target: Places that may see them.
        states: What makes the hidden states `[1, seq, hidden]`.
    """
    embedded: list[Tensor] = []

    def watch(_: nn.Module, __: object, output: Tensor) -> Tensor:
        embedded.append(output.detach().requires_grad_())
        return embedded[0].clone()  # some scale it in place

    row = positions[None].to(network_device(network))
    tokens = torch.arange(row.shape[1], device=row.device)[None] % vocabulary_size(network)
    batch = TextBatch(input_ids=tokens, labels=tokens, position_ids=row, document_ids=row)
    handle = input_embedding(network).register_forward_hook(watch)
    try:
        with inference(network), torch.enable_grad():
            hidden = states(network, batch)
    finally:
        handle.remove()
    if not hidden.requires_grad:
        return False
    # Not their plain sum, which behind a layer norm is the same for every input.
    weights = torch.linspace(-1, 1, hidden.shape[-1], device=hidden.device)
    with torch.enable_grad():
        gradient = torch.autograd.grad((hidden[:, target] * weights).sum(), embedded[0])[0]
    return bool(gradient.flatten(0, -2)[source].any())
