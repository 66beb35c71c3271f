from __future__ import annotations

import pytest
import torch
from ranks import run_on_ranks
from staged_run import packed_rows
from tiny_architectures import tiny_architecture
from torch import Tensor

from lightllm.models.hidden_states import hidden_states
from lightllm.parallel.layout import find_layout
from lightllm.parallel.microbatches import split_rows
from lightllm.parallel.relay import relay
from lightllm.parallel.schedules import ScheduleName, make_plan
from lightllm.parallel.stages import drop_others, make_stages

BATCH = packed_rows(5, seed=4)


def pass_through(name: ScheduleName) -> list[Tensor]:
    torch.manual_seed(0)
    layout = find_layout(tiny_architecture("llama", num_hidden_layers=4))
    plan = make_plan(name, 2, 4, None)
    stages = make_stages(layout, [4 // plan.num_stages] * plan.num_stages)
    own = plan.stages_of(torch.distributed.get_rank())
    drop_others(stages, own)
    group = torch.distributed.group.WORLD
    assert group is not None
    with torch.no_grad():
        given = relay(plan, [stages[index] for index in own], split_rows(BATCH, 3), 32, torch.float32, group)
        return [hidden for hidden, _ in given]


@pytest.mark.parametrize("name", ["1f1b", "interleaved_1f1b", "zbv"])
def test_micro_batches_of_any_size_come_through_in_their_order(name: str) -> None:
    torch.manual_seed(0)
    with torch.no_grad():
        expected = hidden_states(tiny_architecture("llama", num_hidden_layers=4), BATCH)
    found = run_on_ranks(pass_through, 2, name)
    last = make_plan(name, 2, 4, None).rank_of(make_plan(name, 2, 4, None).num_stages - 1)  # type: ignore[arg-type]
    assert found[1 - last] == []
    assert [len(hidden) for hidden in found[last]] == [2, 2, 1]
    torch.testing.assert_close(torch.cat(found[last]), expected)
