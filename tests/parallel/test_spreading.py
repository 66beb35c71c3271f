from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from killable_run import Recipe, make_material
from ranks import run_on_ranks
from tiny_objective import objective, scratch
from tiny_run import tiny_trainer

from lightllm.callbacks import BeforeAndAfter, Predictions, SampleGenerations
from lightllm.generate import Decoding
from lightllm.modules import (
    ContrastivePretraining,
    Distillation,
    OnPolicy,
    PrototypicalNetwork,
    SequenceClassification,
)
from lightllm.parallel import ParallelStrategy, PipelineParallelStrategy
from lightllm.parallel.spreading import as_in_a_step

PROMPTS: list[Any] = ["The whale", "Call me"]


def test_a_whole_network_is_used_as_it_is() -> None:
    module = objective()
    before = copy.deepcopy(module.state_dict())
    with as_in_a_step(module):
        assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())


def fit_and_tell(material: Path, run: Path, strategy: Any) -> None:
    size = torch.distributed.get_world_size() if torch.distributed.is_initialized() else 1
    decoding = Decoding(max_new_tokens=6)
    trainer = {"max_steps": 2, "val_check_interval": 1, "devices": size, "strategy": strategy() if size > 1 else "auto"}
    callbacks: Any = lambda: [SampleGenerations(PROMPTS, decoding), BeforeAndAfter(PROMPTS, decoding)]  # noqa: E731
    Recipe(material, lora=True, dropout=0.0, trainer=trainer, callbacks=callbacks).train(run)


@pytest.mark.parametrize("fields", [{}, {"tensor": 2}])
def test_a_spread_network_writes_as_a_whole_one(tmp_path: Path, fields: dict[str, int]) -> None:
    make_material(tmp_path)
    fit_and_tell(tmp_path, tmp_path / "one", None)
    run_on_ranks(fit_and_tell, 2, tmp_path, tmp_path / "two", lambda: ParallelStrategy(**fields))
    one, two = (json.loads((tmp_path / run / "before_and_after.json").read_text())["before"] for run in ("one", "two"))
    assert two["answers"] == one["answers"]
    assert two["metrics"] == pytest.approx(one["metrics"], rel=1e-4)
    lines = (tmp_path / "two" / "samples.jsonl").read_text().splitlines()
    assert [json.loads(line)["prompt"] for line in lines] == PROMPTS * 2
    if fields:  # the same batches
        assert lines == (tmp_path / "one" / "samples.jsonl").read_text().splitlines()


def test_ranks_that_would_not_work_in_step_are_refused(tmp_path: Path) -> None:
    trainer = tiny_trainer(tmp_path, [], strategy=ParallelStrategy())
    with pytest.raises(ValueError, match=r"generations differ in length .* set trainer.strategy to ddp or auto"):
        Predictions("generations").setup(trainer, objective(), "predict")
    module = Distillation(scratch(), teacher=scratch(), on_policy=OnPolicy())
    module.trainer = trainer
    with pytest.raises(ValueError, match=r"on_policy has every rank write answers .*, and under ParallelStrategy"):
        module.configure_model()


@pytest.mark.parametrize("objective_class", [ContrastivePretraining, SequenceClassification, PrototypicalNetwork])
@pytest.mark.parametrize("strategy", [ParallelStrategy, lambda: PipelineParallelStrategy(2, 4)])
def test_objectives_whose_ranks_call_the_network_unequally_often_are_refused(
    objective_class: Any, strategy: Any, tmp_path: Path
) -> None:
    module = objective_class(scratch())
    module.trainer = tiny_trainer(tmp_path, [], strategy=strategy())
    with pytest.raises(ValueError, match=rf"{objective_class.__name__} .* equally often: train with strategy ddp"):
        module.setup("fit")


def measure_before_and_after(material: Path, run: Path, strategy: Any) -> None:
    trainer = {"max_steps": 2, "devices": 2, "strategy": strategy()}
    Recipe(material, lora=True, dropout=0.0, trainer=trainer, callbacks=lambda: [BeforeAndAfter()]).train(run)


def test_stages_of_layers_are_measured_and_asked_nothing(tmp_path: Path) -> None:
    make_material(tmp_path)
    fit_and_tell(tmp_path, tmp_path / "one", None)
    run_on_ranks(measure_before_and_after, 2, tmp_path, tmp_path / "two", lambda: PipelineParallelStrategy(2, 4))
    one, two = (json.loads((tmp_path / run / "before_and_after.json").read_text())["before"] for run in ("one", "two"))
    assert two["metrics"] == pytest.approx(one["metrics"], rel=1e-4)
    trainer = tiny_trainer(tmp_path, [], strategy=PipelineParallelStrategy(2, 4))
    for callback in (SampleGenerations(PROMPTS), BeforeAndAfter(PROMPTS)):
        with pytest.raises(ValueError, match=r"has the network .*, and under PipelineParallelStrategy a rank has some"):
            callback.setup(trainer, objective(), "fit")
