from __future__ import annotations

from typing import Any

import pytest
import torch
from ranks import run_on_ranks
from staged_run import packed_rows
from tiny_networks import tiny_llama
from torch import Tensor
from torch.nn.functional import cross_entropy

from lightllm.batch import IGNORE_INDEX, TextBatch
from lightllm.models.anatomy import output_head
from lightllm.models.hidden_states import hidden_states
from lightllm.parallel.layout import find_layout
from lightllm.parallel.schedules import make_plan
from lightllm.parallel.staged_network import StagedNetwork

BATCHES = [packed_rows(rows, seed=rows) for rows in (4, 1, 7)]


def summed(hidden: Tensor, batch: TextBatch, head: Tensor) -> tuple[Tensor, Tensor]:
    logits = (hidden @ head.T).flatten(0, 1)
    loss = cross_entropy(logits, batch["labels"].flatten(), reduction="sum", ignore_index=IGNORE_INDEX)
    return loss, (batch["labels"] != IGNORE_INDEX).sum()


def staged(cut: Any = "flops") -> StagedNetwork:
    torch.manual_seed(0)
    network = tiny_llama(40).train()
    group = torch.distributed.group.WORLD
    assert group is not None
    return StagedNetwork(make_plan("1f1b", 2, 3, None), find_layout(network), cut, group)


def train() -> dict[str, Any]:
    network = staged()
    head = output_head(network.network).weight
    sums = [network.train(batch, lambda hidden, part: summed(hidden, part, head)) for batch in BATCHES]
    with torch.no_grad():
        found = [sum(float(summed(*pair, head)[0]) for pair in network.evaluate(batch)) for batch in BATCHES]
    names = {id(one): name for name, one in network.network.named_parameters()}
    return {
        "sums": sums,
        "evaluated": found,
        "gradients": {names[id(one)]: one.grad for one in network.parameters},
        "shared": [names[id(one)] for one in network.shared],
        "counted": sum(one.numel() for one in network.counted_once),
    }


def test_sums_and_gradients_are_the_whole_networks_whatever_the_number_of_rows() -> None:
    torch.manual_seed(0)
    whole = tiny_llama(40).train()
    expected = []
    for batch in BATCHES:
        loss, weight = summed(hidden_states(whole, batch), batch, whole.lm_head.weight)
        loss.backward()
        expected.append(torch.stack([loss.detach().double(), weight.double()]))
    ranks = run_on_ranks(train, 2)
    tied = "model.embed_tokens.weight"
    for rank in ranks:
        torch.testing.assert_close(torch.stack(rank["sums"]), torch.stack(expected), rtol=1e-6, atol=0)
        assert rank["shared"] == [tied]
        for name, gradient in rank["gradients"].items():
            if name != tied:
                torch.testing.assert_close(gradient, whole.get_parameter(name).grad, rtol=1e-4, atol=1e-4)
    both = ranks[0]["gradients"][tied] + ranks[1]["gradients"][tied]
    torch.testing.assert_close(both, whole.get_parameter(tied).grad, rtol=1e-4, atol=1e-4)
    assert ranks[0]["evaluated"] == [0, 0, 0]
    assert ranks[1]["evaluated"] == pytest.approx([float(loss) for loss, _ in expected], rel=1e-5)
    assert sum(rank["counted"] for rank in ranks) == sum(one.numel() for one in whole.parameters())


def refusals() -> list[str]:
    said = []
    for cut in ([2, 1], [2]):
        with pytest.raises(ValueError, match="cut is") as raised:
            staged(cut)
        said.append(str(raised.value))
    torch.manual_seed(0)
    group = torch.distributed.group.WORLD
    assert group is not None
    with pytest.raises(ValueError, match="has 2 blocks, too few for 4 stages"):
        StagedNetwork(make_plan("zbv", 2, 4, None), find_layout(tiny_llama()), "flops", group)
    return said


def test_a_network_is_cut_as_asked_or_not_at_all() -> None:
    for said in run_on_ranks(refusals, 2):
        assert all("add up to the network's 2 blocks" in one for one in said)
