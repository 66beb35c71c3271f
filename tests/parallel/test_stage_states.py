"""Checkpoints of a pipeline hold the whole network: a run goes on in one process, and the other way round."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from ranks import run_on_ranks
from staged_run import assert_same_weights, checkpoint, global_batches, module, train
from tiny_networks import tiny_llama
from torch.optim import AdamW
from transformers import LlamaForCausalLM

from lightllm.batch import TextBatch
from lightllm.checkpoint_io import read_checkpoint
from lightllm.models import Adapter, LoRA
from lightllm.parallel import ParallelStrategy, PipelineParallelStrategy
from lightllm.parallel.layout import find_layout
from lightllm.parallel.stage_states import (
    load_own_optimizer_state,
    load_own_weights,
    own_optimizer_state,
    own_weights,
    put_together,
)
from lightllm.parallel.stages import drop_others, make_stages

FIRST, SECOND = global_batches(1, steps=3), global_batches(1, steps=3, seed=100)
TWO = {"pipeline": 2, "microbatches": 4}
TENSOR = {"tensor": 2}
"""Whose checkpoints are folders."""
FOUR = {"pipeline": 4, "microbatches": 4, "schedule": "gpipe"}


class StopAfterAnEpoch(Callback):
    """Ends a run of several epochs early, with its schedule that of the whole."""

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        trainer.should_stop = True


def fit(folder: Path, adapter: Adapter | None, batches: list[TextBatch], strategy: dict[str, Any], run: Any) -> Any:
    """Part of a run of two epochs, in one process or on a rank."""
    if strategy:
        devices = torch.distributed.get_world_size()
        kind = PipelineParallelStrategy if "pipeline" in strategy else ParallelStrategy
        run = {"strategy": kind(**strategy), "devices": devices} | run
    return train(module(adapter=adapter), batches, folder, max_epochs=2, **run)


def two_epochs(folder: Path, adapter: Adapter | None, before: dict[str, Any], after: dict[str, Any]) -> dict[str, Any]:
    """Train an epoch under one strategy, go on for another under the next; the last checkpoint."""
    parts = (
        ("first", FIRST, before, {"callbacks": [StopAfterAnEpoch()]}),
        ("second", SECOND, after, {"ckpt_path": checkpoint(folder / "first")}),
    )
    for name, batches, strategy, run in parts:
        arguments = (folder / name, adapter, batches, strategy, run)
        if strategy:
            run_on_ranks(fit, strategy.get("pipeline", 2), *arguments, seconds=150)
        else:
            fit(*arguments)
    return read_checkpoint(checkpoint(folder / "second"))


@pytest.fixture(scope="module", params=["full", "lora"])
def uninterrupted(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """An adapter, and the checkpoint of both epochs in one process."""
    adapter = LoRA(rank=4) if request.param == "lora" else None
    return adapter, two_epochs(tmp_path_factory.mktemp("one"), adapter, {}, {})


@pytest.mark.parametrize(("before", "after"), [(TWO, {}), ({}, TWO), (TWO, FOUR), (TENSOR, TWO), (TWO, TENSOR)])
def test_a_run_goes_on_under_another_strategy(
    tmp_path: Path, uninterrupted: Any, before: dict[str, Any], after: dict[str, Any]
) -> None:
    adapter, expected = uninterrupted
    found = two_epochs(tmp_path, adapter, before, after)
    assert found["global_step"] == expected["global_step"] == 6
    assert_same_weights(found["state_dict"], expected["state_dict"])
    (ours,), (theirs,) = found["optimizer_states"], expected["optimizer_states"]
    assert ours["param_groups"] == theirs["param_groups"]
    assert ours["state"].keys() == theirs["state"].keys()
    assert found["lr_schedulers"] == expected["lr_schedulers"]


def staged_llama(rank: int) -> tuple[LlamaForCausalLM, AdamW]:
    """One of two stages, after a step of an optimizer over the whole network."""
    network = tiny_llama(tied=False)
    stages = make_stages(find_layout(network), [1, 1])
    drop_others(stages, [rank])
    optimizer = AdamW([{"params": [one for one in network.parameters() if one.ndim == d]} for d in (2, 1)])
    for parameter in stages[rank].parameters():
        parameter.grad = torch.full_like(parameter, 0.1)
    optimizer.step()
    return network, optimizer


def gathered() -> tuple[dict[Any, Any], dict[Any, Any]]:
    torch.manual_seed(0)
    network, optimizer = staged_llama(torch.distributed.get_rank())
    group = torch.distributed.group.WORLD
    assert group is not None
    return put_together(own_weights(network), group), put_together(own_optimizer_state(optimizer)["state"], group)


def test_the_first_rank_gets_everything_and_takes_its_own_back() -> None:
    (weights, states), others = run_on_ranks(gathered, 2)
    assert others == ({}, {})
    torch.manual_seed(0)
    whole = tiny_llama(tied=False)
    expected = AdamW([{"params": [one for one in whole.parameters() if one.ndim == d]} for d in (2, 1)])
    for parameter in whole.parameters():
        parameter.grad = torch.full_like(parameter, 0.1)
    expected.step()
    assert_same_weights(weights, whole.state_dict(), 0.0)
    theirs = expected.state_dict()["state"]
    assert states.keys() == theirs.keys()
    assert all(torch.equal(states[index]["exp_avg"], theirs[index]["exp_avg"]) for index in theirs)

    network, optimizer = staged_llama(1)
    load_own_weights(network, {name: value + 1 for name, value in weights.items()})
    assert "model.layers.1.mlp.up_proj.weight" in own_weights(network)
    assert_same_weights(own_weights(network), {name: weights[name] + 1 for name in own_weights(network)}, 0.0)
    load_own_optimizer_state(optimizer, {**optimizer.state_dict(), "state": states})
    assert own_optimizer_state(optimizer)["state"].keys() < states.keys()
