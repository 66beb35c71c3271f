from __future__ import annotations

import pytest
import torch
from tiny_networks import tiny_llama
from tiny_run import tiny_batches
from torch import Tensor

from lightllm.batch import Document, pack_documents
from lightllm.compression.token_watch import TokenWatch, real_positions

ROWS = [[5, 9, 2, 7, 1], [3, 3, 8], [6, 1, 4, 4]]


def test_what_is_seen_is_each_document_as_if_it_were_alone_and_no_padding() -> None:
    network = tiny_llama()
    packed = pack_documents([[Document(ids, [True] * len(ids), i) for i, ids in enumerate(ROWS)]], length=16)
    seen: list[tuple[Tensor, Tensor]] = []
    watch = TokenWatch(network)
    watch.on(network.model.layers[1], lambda before, after: seen.append((before, after)))
    assert watch.run([packed, packed]) == 2 * (4 + 2 + 3)
    (before, after), again = seen
    assert all(map(torch.equal, (before, after), again))
    alone = [network(torch.tensor([ids[:-1]]), output_hidden_states=True).hidden_states for ids in ROWS]
    torch.testing.assert_close(before, torch.cat([states[1][0] for states in alone]), rtol=1e-4, atol=1e-4)
    # Behind the last layer transformers shows the normed state only.
    expected = torch.cat([states[2][0] for states in alone])
    torch.testing.assert_close(network.model.norm(after), expected, rtol=1e-4, atol=1e-4)


def test_the_network_is_left_as_it_was_even_by_an_error() -> None:
    network = tiny_llama().train()
    watch = TokenWatch(network)

    def fail(_: Tensor, __: Tensor) -> None:
        raise RuntimeError("seen")

    watch.on(network.model.norm, fail)
    with pytest.raises(RuntimeError, match="seen"):
        watch.run(tiny_batches(1))
    assert network.training
    assert not any(module._forward_hooks for module in network.modules())


def test_bfloat16_is_seen_in_float32_without_gradients() -> None:
    network = tiny_llama().bfloat16()
    seen: list[Tensor] = []
    watch = TokenWatch(network)
    watch.on(network.lm_head, lambda before, after: seen.append(after))
    watch.on(network.model.norm, lambda before, after: seen.extend((before, after)))
    (batch,) = tiny_batches(1, rows=2, length=8, padding=2)
    assert watch.run([batch]) == int(real_positions(batch).sum()) == 2 * 6
    assert [tuple(one.shape) for one in seen] == [(12, 32)] * 2  # the head is not run: nobody needs the logits
    assert all(one.dtype == torch.float32 and not one.requires_grad for one in seen)
