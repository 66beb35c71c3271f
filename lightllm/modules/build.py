"""The build pipeline: network, its structure and rank, adapter, masks and quantizers, compile; always in this order."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import NamedTuple

from torch import nn
from transformers import PreTrainedModel

from lightllm.models.adapters import Adapter
from lightllm.models.anatomy import blocks, check_head, decoder, output_head, unwrapped
from lightllm.models.document_attention import BY_DOCUMENT
from lightllm.models.head_transform import states_for_head
from lightllm.models.hidden_states import check_causal
from lightllm.models.network import BuildRequest, Network, Task
from lightllm.models.transformation import Announcements, Record, Transformation, apply_transformations


class BuildPlan(NamedTuple):
    """Everything that decides what the built network is."""

    network: Network
    adapter: Adapter
    task: Task
    gradient_checkpointing: bool
    compile: bool


def build_network(
    plan: BuildPlan,
    request: BuildRequest,
    transformations: Sequence[Transformation] = (),
    records: dict[str, Record] | None = None,
    announcements: Announcements | None = None,
) -> nn.Module:
    """Build, transform, adapt and compile a network.

    Args:
        plan: What it is made of.
        request: What the objective asks of it.
        transformations: Changes to it, in any order.
        records: Of an earlier build of the same run, by which changes are repeated; those of this one are added.
        announcements: Told of the network as it comes, and of what is done to it here for the first time.

    Raises:
        ValueError: A part refuses the one before it; the message says why.
    """
    records = {} if records is None else records
    network = plan.network.build(request)
    if isinstance(network, PreTrainedModel):
        # Without a cache, restarting positions keep packed documents apart; with one, they leak silently.
        network.config.use_cache = False
    if plan.task == "causal" and not on_meta(network):
        _check_causal_network(network)
    if plan.task == "masked" and not on_meta(network):
        check_head(network, states_for_head)
    if announcements is not None:
        announcements.make("dense", network)
    apply_transformations(network, transformations, records, before_adapter=True, announcements=announcements)
    network = plan.adapter.attach(network)
    if plan.task != "encoder":
        output_head(network)  # which refuses an adapter on it
    apply_transformations(network, transformations, records, before_adapter=False)
    if plan.gradient_checkpointing:
        checkpoint_gradients(network)
    if plan.compile:
        base = unwrapped(network)
        if isinstance(base, PreTrainedModel) and base.config._attn_implementation == BY_DOCUMENT:
            base.set_attn_implementation("sdpa")  # a loop over documents would be compiled anew for every row
        # Block by block: one compilation serves them all, and names in the state dict stay as they are.
        for block in blocks(network):
            block.compile()
    return network.train()


def on_meta(network: nn.Module) -> bool:
    """Whether the network has no weights yet, so that nothing can be computed with it."""
    return any(parameter.is_meta for parameter in network.parameters())


def _check_causal_network(network: nn.Module) -> None:
    try:
        check_causal(network)
    except IndexError:  # its layers read the mask themselves, and find document lengths
        if not isinstance(network, PreTrainedModel) or network.config._attn_implementation != BY_DOCUMENT:
            raise
        network.set_attn_implementation("sdpa")
        check_causal(network)
    check_head(network)


def checkpoint_gradients(network: nn.Module) -> None:
    """Have every block recompute its activations in the backward pass.

    Raises:
        ValueError: The network is a module of the user's own.
    """
    base = unwrapped(network)
    if not isinstance(base, PreTrainedModel):
        raise ValueError(
            f"gradient_checkpointing works on transformers networks; {type(decoder(network)).__name__} should call "
            "torch.utils.checkpoint itself"
        )
    with warnings.catch_warnings():
        # Its new name is not in every transformers that we support.
        warnings.filterwarnings("ignore", ".gradient_checkpointing_enable. is deprecated", FutureWarning)
        base.gradient_checkpointing_enable({"use_reentrant": False})
