"""A block's profile against a real block, and over the architectures that we know."""

from __future__ import annotations

import pytest
import torch
from own_networks import Transformer
from tiny_architectures import PACKING, small_fields
from tiny_networks import tiny_llama

from lightllm.models import FromConfig, FromModule, Full, LoRA
from lightllm.models.empty_network import empty_network
from lightllm.parallel.block_profile import MicroBatch, NetworkProfile, profile
from lightllm.parallel.one_block import one_block

ROWS, LENGTH, WIDTH, INNER = 2, 16, 32, 48
WITHOUT_FAKES = ("mixtral", "qwen3_moe")
"""Architectures whose experts' kernel has no shapes alone in float32."""
BATCH = MicroBatch(ROWS, LENGTH, LENGTH)


def llama(adapter: Full | LoRA | None = None, tensor: int = 1, **options: object) -> NetworkProfile:
    make = one_block(tiny_llama(tied=False), adapter or Full(), tensor)
    return profile(make, options.get("batch", BATCH), options.get("autocast"), True)  # type: ignore[arg-type]


def test_products_are_those_of_the_matrices_and_the_pairs() -> None:
    block = llama().block
    matrices = 3 * WIDTH * WIDTH + 3 * WIDTH * INNER
    pairs = ROWS * 4 * 8 * LENGTH * LENGTH
    assert sum(one.flops for one in block.forward) == 2 * ROWS * LENGTH * matrices + 4 * pairs / 2
    assert sum(one.flops for one in block.backward) == 4 * ROWS * LENGTH * matrices + 10 * pairs / 2


def test_a_lora_blocks_backward_pass_forms_no_gradient_of_whole_weights() -> None:
    full, lora = llama().block, llama(LoRA(rank=1)).block
    assert sum(one.flops for one in lora.backward) < 0.75 * sum(one.flops for one in full.backward)
    assert lora.kept < full.kept


def test_what_is_kept_grows_with_rows_and_shrinks_with_shared_matrices() -> None:
    one, two = (llama(batch=MicroBatch(rows, LENGTH, LENGTH)).block for rows in (2, 4))
    assert two.kept == 2 * one.kept
    assert two.hidden == 2 * one.hidden == 4 * ROWS * LENGTH * WIDTH * 2
    shared = llama(tensor=2)
    assert one.kept / 2 < shared.block.kept < one.kept
    assert shared.block.hidden == one.hidden


def test_autocast_keeps_copies_of_weights() -> None:
    mixed = llama(autocast=torch.bfloat16).block
    matrices = 3 * WIDTH * WIDTH + 3 * WIDTH * INNER
    long = llama(autocast=torch.bfloat16, batch=MicroBatch(2 * ROWS, LENGTH, LENGTH)).block
    assert 2 * mixed.kept - long.kept == 2 * matrices


def test_documents_in_a_row_cost_fewer_pairs() -> None:
    packed = llama(batch=MicroBatch(ROWS, LENGTH, 4)).block
    whole = llama().block
    assert sum(one.flops for one in packed.forward) < sum(one.flops for one in whole.forward)


def test_heads_that_do_not_divide_are_refused() -> None:
    with pytest.raises(ValueError, match="num_key_value_heads 2 does not divide by a tensor degree of 4"):
        llama(tensor=4)


@pytest.mark.parametrize("architecture", PACKING)
def test_every_architecture_has_a_profile_or_says_why_not(architecture: str) -> None:
    bare = empty_network(FromConfig(architecture, small_fields(architecture)), "causal")
    if architecture in WITHOUT_FAKES:
        with pytest.raises(ValueError, match="does not run on tensors without values"):
            profile(one_block(bare, Full()), BATCH, None, False)
        return
    found = profile(one_block(bare, Full()), BATCH, None, False)
    assert found.block.kept > found.block.hidden
    assert sum(one.flops for one in found.block.backward) > sum(one.flops for one in found.block.forward) > 0


def test_a_module_of_ones_own() -> None:
    bare = empty_network(FromModule(Transformer), "causal", vocabulary=50)
    found = profile(one_block(bare, Full()), BATCH, None, False)
    assert found.block.hidden == ROWS * LENGTH * 16 * 4
