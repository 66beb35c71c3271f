"""A run in a pipeline is the run of one process: weights, losses, validation and checkpoints."""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from command_line import save_small_network
from killable_run import Recipe, equal, make_material
from lightning.pytorch import Callback, LightningModule, Trainer
from ranks import kill_rank, run_on_ranks
from staged_run import (
    Reference,
    assert_same_weights,
    compare_with_one_process,
    fit,
    global_batches,
    module,
    read,
    train,
)
from tiny_objective import adamw
from torch.optim import Optimizer

from lightllm.batch import TextBatch
from lightllm.callbacks import GradientNorm, LossSpike, NetworkSize, Throughput
from lightllm.checkpoint_io import newest_checkpoint, read_entry
from lightllm.models import Adapter, DoRA, Frozen, LoRA, Pretrained, QLoRA
from lightllm.modules import FineTuning
from lightllm.parallel import PipelineParallelStrategy
from lightllm.parallel.schedules import ScheduleName


@pytest.mark.parametrize("schedule", ["gpipe", "1f1b", "interleaved_1f1b", "looped_bfs", "zero_bubble", "zbv"])
def test_two_ranks_are_one_process(tmp_path: Path, one_process: Reference, schedule: str) -> None:
    compare_with_one_process(tmp_path, one_process, 2, {"pipeline": 2, "microbatches": 4, "schedule": schedule})


@pytest.mark.parametrize("schedule", ["gpipe", "1f1b"])
def test_four_stages_are_one_process(tmp_path: Path, one_process: Reference, schedule: str) -> None:
    compare_with_one_process(tmp_path, one_process, 4, {"pipeline": 4, "microbatches": 4, "schedule": schedule})


@pytest.mark.parametrize("schedule", ["interleaved_1f1b", "looped_bfs", "zero_bubble", "zbv"])
def test_four_ranks_of_two_stages_each(tmp_path: Path, one_process: Reference, schedule: str) -> None:
    compare_with_one_process(
        tmp_path, one_process, 4, {"pipeline": 4, "microbatches": 4, "schedule": schedule}, "deep", tied=False, layers=8
    )


@pytest.mark.parametrize("schedule", ["1f1b", "zero_bubble"])
def test_an_adapter_trains_in_stages(tmp_path: Path, one_process: Reference, schedule: str) -> None:
    strategy = {"pipeline": 2, "microbatches": 4, "schedule": schedule}
    compare_with_one_process(tmp_path, one_process, 2, strategy, "lora", adapter=LoRA(rank=4))


def test_a_stage_of_which_nothing_trains(tmp_path: Path, one_process: Reference) -> None:
    strategy = {"pipeline": 2, "microbatches": 4, "cut": [2, 2]}
    compare_with_one_process(tmp_path, one_process, 2, strategy, "frozen", tied=False, adapter=Frozen(num_blocks=2))


@pytest.mark.parametrize(
    ("name", "fields"),
    [("recomputed", {"gradient_checkpointing": True}), ("dora", {"adapter": DoRA(rank=4)})],
)
def test_what_else_is_one_process(tmp_path: Path, one_process: Reference, name: str, fields: dict[str, Any]) -> None:
    strategy = {"pipeline": 2, "microbatches": 4, "cut": "parameters"}
    compare_with_one_process(tmp_path, one_process, 2, strategy, name, **fields)


def in_4_bits(folder: Path, network: Path, batches: list[TextBatch], strategy: dict[str, Any] | None) -> Any:
    """A run of an adapter over weights of 4 bits, in one process or on a rank."""
    objective = FineTuning(Pretrained(str(network)), QLoRA(rank=4, compute_dtype="float32"), optimizer=adamw(3e-3))
    if strategy is None:
        return train(objective, batches, folder)
    return train(objective, batches, folder, strategy=PipelineParallelStrategy(**strategy), devices=2)


def test_4_bit_weights_are_cut_like_others(tmp_path: Path) -> None:
    network, batches = save_small_network(tmp_path / "network"), global_batches(1, steps=4)
    expected = in_4_bits(tmp_path / "one", network, batches, None)
    for rank in run_on_ranks(in_4_bits, 2, tmp_path / "two", network, batches, {"pipeline": 2, "microbatches": 4}):
        assert rank["losses"] == pytest.approx(expected["losses"], rel=1e-5)
        assert rank["validation"] == pytest.approx(expected["validation"], rel=1e-5)
    assert_same_weights(read(tmp_path / "two")["state_dict"], read(tmp_path / "one")["state_dict"])


@pytest.mark.parametrize("adapter", [None, LoRA(rank=4)])
def test_pipelines_beside_each_other(tmp_path: Path, one_process: Reference, adapter: Adapter | None) -> None:
    name = "full" if adapter is None else "lora"
    fields = {} if adapter is None else {"adapter": adapter}
    compare_with_one_process(tmp_path, one_process, 4, {"pipeline": 2, "microbatches": 3}, name, **fields)


@pytest.mark.parametrize("precision", ["bf16-true", "bf16-mixed"])
def test_half_precision_is_that_of_one_process(tmp_path: Path, precision: str) -> None:
    """Sums are rounded in another order, so the curves are alike and no more."""
    batches, run = global_batches(1, steps=6), {"precision": precision}
    expected = train(module(), batches, tmp_path / "one", **run)
    strategy = {"pipeline": 2, "microbatches": 4, "schedule": "zbv"}
    for rank in run_on_ranks(fit, 2, tmp_path / "two", strategy, {}, batches, run):
        assert rank["losses"] == pytest.approx(expected["losses"], abs=2e-2)
        assert rank["validation"] == pytest.approx(expected["validation"], abs=2e-2)


class Dies(Callback):
    """Ends the second rank as `kill -9` would, in the middle of an optimizer step."""

    def on_before_zero_grad(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        if trainer.global_step == 4 and trainer.global_rank == 1:
            kill_rank()


def real_run(recipe: Recipe, folder: Path, schedule: ScheduleName) -> None:
    strategy = PipelineParallelStrategy(2, 4, schedule)
    replace(recipe, trainer={**recipe.trainer, "strategy": strategy, "devices": 2}).train(folder)


@pytest.mark.parametrize(("schedule", "lora"), [("1f1b", False), ("gpipe", True)])
def test_a_run_with_all_callbacks_is_killed_and_goes_on_to_the_same_end(
    tmp_path: Path, schedule: ScheduleName, lora: bool
) -> None:
    make_material(tmp_path)
    watch = [Throughput(1), GradientNorm(per_block=True), NetworkSize(), LossSpike()]
    recipe = Recipe(tmp_path, lora=lora, callbacks=lambda: list(watch), trainer={"max_steps": 8, "max_epochs": 3})
    run_on_ranks(real_run, 2, recipe, tmp_path / "whole", schedule)
    killed = replace(recipe, callbacks=lambda: [*watch, Dies()])
    began = time.monotonic()
    with pytest.raises(AssertionError, match=r"rank 1 ended with -9"):
        run_on_ranks(real_run, 2, killed, tmp_path / "killed", schedule)
    assert time.monotonic() - began < 60
    assert read_entry(newest(tmp_path / "killed"), "global_step", 0) == 4
    run_on_ranks(real_run, 2, recipe, tmp_path / "killed", schedule)
    ours, whole = (torch.load(newest(tmp_path / name), weights_only=True) for name in ("killed", "whole"))
    assert ours["global_step"] == whole["global_step"] == 8
    assert equal(ours["state_dict"], whole["state_dict"])
    assert equal(ours["optimizer_states"], whole["optimizer_states"])
    rows = [(tmp_path / name / "metrics.csv").read_text().splitlines() for name in ("killed", "whole")]
    assert len(rows[0]) == len(rows[1])


def newest(folder: Path) -> Path:
    found = newest_checkpoint(folder / "checkpoints")
    assert found is not None
    return found


def test_the_gradient_norm_is_that_of_all_stages(tmp_path: Path) -> None:
    """Counting a tied matrix once, before it is clipped."""
    batches = global_batches(1, steps=3)
    expected = train(module(), batches, tmp_path / "one", callbacks=[noted := Norms(), GradientNorm(per_block=True)])
    ranks = run_on_ranks(norms_of, 2, tmp_path / "two", batches)
    assert expected["losses"]
    for rank in ranks:
        assert rank == pytest.approx(noted.seen, rel=1e-5)


class Norms(Callback):
    """Keeps what `GradientNorm` logs."""

    def __init__(self) -> None:
        self.seen: dict[str, float] = {}

    def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
        self.seen = {name: float(value) for name, value in trainer.callback_metrics.items() if "gradient_norm" in name}


def norms_of(folder: Path, batches: list[TextBatch]) -> dict[str, float]:
    callbacks = [noted := Norms(), GradientNorm(per_block=True)]
    fit(folder, {"pipeline": 2, "microbatches": 4}, {}, batches, {"callbacks": callbacks})
    return noted.seen
