"""Hidden states of a batch: the one call of a network, for every objective."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from lightllm.batch import TextBatch
from lightllm.models.anatomy import OwnNetwork, decoder, learns_a_prompt, unwrapped


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
