"""Runs that end in the middle and go on: under the same strategy, under another, from a folder or from a file."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from killable_run import Recipe, equal, make_material
from lightning.pytorch import Callback
from parity import assert_close, whole_parameters
from ranks import run_on_ranks
from torch import Tensor
from typing_extensions import override

from lightllm.checkpoint_io import newest_checkpoint, read_checkpoint
from lightllm.models import FromConfig
from lightllm.modules import CausalPretraining, LanguageModule
from lightllm.parallel import ParallelStrategy

STOP, STEPS = 3, 6


class Stop(Exception):
    pass


class StopAt(Callback):
    """Breaks off behind a step, on all ranks, as an error would."""

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        if trainer.global_step == STOP:
            raise Stop


class Keep(Callback):
    """Remembers the module."""

    module: LanguageModule

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        self.module = pl_module


class Exact(Recipe):
    """Draws nothing while it trains, so that heads can be split."""

    @override
    def module(self) -> LanguageModule:
        if self.lora:
            return super().module()
        fields = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
        return CausalPretraining(FromConfig("llama", fields))


@pytest.fixture(scope="module")
def material(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("material")
    make_material(folder)
    return folder


def train(recipe: Recipe, run: Path, strategy: Any, stop: bool, accumulate: int) -> dict[str, Tensor]:
    """Begin a run or go on with it, on this rank; nothing where it breaks off."""
    keep = Keep()
    size = torch.distributed.get_world_size() if torch.distributed.is_initialized() else 1
    trainer = {
        "max_steps": STEPS,
        "gradient_clip_val": 0.5,
        "accumulate_grad_batches": accumulate,
        "devices": size,
        "strategy": strategy() if callable(strategy) else strategy,
        "val_check_interval": 2 * accumulate,
    }
    recipe = replace(recipe, trainer=trainer, callbacks=lambda: [keep, *([StopAt()] if stop else [])])
    if stop:
        with pytest.raises(Stop):
            recipe.train(run)
        return {}
    recipe.train(run)
    return whole_parameters(keep.module)


def on_ranks(count: int, *arguments: Any) -> dict[str, Tensor]:
    """What every one of so many ranks ends with."""
    first, *others = run_on_ranks(train, count, *arguments)
    for other in others:
        assert equal(first, other)
    return first


def shards() -> ParallelStrategy:
    return ParallelStrategy()


def shards_in_a_file() -> ParallelStrategy:
    return ParallelStrategy(save_full=True)


def copies() -> ParallelStrategy:
    return ParallelStrategy(replicate=2)


def tensor() -> ParallelStrategy:
    return ParallelStrategy(tensor=2)


SAME: dict[str, tuple[int, Any, bool]] = {
    "ddp": (2, "ddp", False),
    "shards": (2, shards, False),
    "shards of lora": (2, shards, True),
    "shards in a file": (2, shards_in_a_file, False),
    "tensor": (2, tensor, False),
    "tensor of lora": (2, tensor, True),
}


@pytest.mark.parametrize("name", SAME)
def test_a_run_that_broke_off_ends_as_the_whole_one(tmp_path: Path, material: Path, name: str) -> None:
    count, strategy, lora = SAME[name]
    recipe = Exact(material, lora=lora, dropout=0.0)
    expected = on_ranks(count, recipe, tmp_path / "whole", strategy, False, 2)
    on_ranks(count, recipe, tmp_path / "broken", strategy, True, 2)
    newest = newest_checkpoint(tmp_path / "broken" / "checkpoints")
    assert newest is not None
    assert newest.is_dir() == (strategy in (shards, tensor))
    found = on_ranks(count, recipe, tmp_path / "broken", strategy, False, 2)
    assert equal(found, expected)
    ours, theirs = (read_checkpoint(tmp_path / run / "checkpoints" / "last.ckpt") for run in ("broken", "whole"))
    for part in ("state_dict", "optimizer_states", "lr_schedulers", "random_numbers", "loops", "callbacks"):
        assert equal(ours[part], theirs[part]), part
    assert (tmp_path / "broken" / "metrics.csv").read_text() == (tmp_path / "whole" / "metrics.csv").read_text()
    if lora:
        assert all("lora_" in key for key in ours["state_dict"])


OTHERS: dict[str, list[tuple[int, Any]]] = {
    "two data ranks": [(2, "ddp"), (2, shards), (2, shards_in_a_file), (4, tensor), (2, "ddp")],
    "one data rank": [(1, "auto"), (2, tensor), (1, "auto")],
}
"""By how many different batches there are at a time: each saves what the next goes on from."""


@pytest.mark.parametrize("name", OTHERS)
@pytest.mark.parametrize("lora", [False, True])
def test_a_run_goes_on_under_another_strategy(tmp_path: Path, material: Path, name: str, lora: bool) -> None:
    recipe = Exact(material, lora=lora, dropout=0.0)
    chain = OTHERS[name]
    expected = on_ranks(*chain[0][:1], recipe, tmp_path / "whole", chain[0][1], False, 2)
    for number, ((count, strategy), (next_count, next_strategy)) in enumerate(pairwise(chain)):
        run = tmp_path / str(number)
        on_ranks(count, recipe, run, strategy, True, 2)
        assert_close(on_ranks(next_count, recipe, run, next_strategy, False, 2), expected)


def refused(*arguments: Any) -> str:
    with pytest.raises(ValueError, match="num_ranks") as caught:
        train(*arguments)
    return str(caught.value)


def test_other_batches_are_refused(tmp_path: Path, material: Path) -> None:
    recipe = Exact(material)
    on_ranks(2, recipe, tmp_path, shards, True, 2)
    for said in run_on_ranks(refused, 4, recipe, tmp_path, shards, False, 1):
        assert "num_ranks was 2 and is 4" in said
        assert "the batches would be others" in said
