from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml
from lightning.pytorch.callbacks import ModelSummary

from lightllm.callbacks import Checkpoint, Interruption, ProgressBar, RandomState, SharedRunFolder, Throughput
from lightllm.cli.command import TrainingCommand
from lightllm.runs import RunFolder


def command(material: Any, *arguments: str, verb: str = "fit", **fields: Any) -> TrainingCommand:
    return TrainingCommand(verb, ["--config", str(material.recipe), *arguments], **fields)


def kinds(one: TrainingCommand) -> list[type]:
    return [type(callback) for callback in one.trainer.callbacks]  # type: ignore[attr-defined]


def test_what_every_run_has(material: Any, workplace: Path) -> None:
    found = kinds(command(material))
    assert found[0] is SharedRunFolder
    assert {Checkpoint, Interruption, RandomState, Throughput, ProgressBar} <= set(found)
    assert ModelSummary not in found
    assert ProgressBar not in kinds(command(material, "--trainer.enable_progress_bar", "false"))


def test_a_callback_of_ones_own_stands_in_for_that_of_every_run(material: Any, workplace: Path) -> None:
    added = command(material, "--trainer.callbacks+=Throughput", "--trainer.callbacks.every_n_steps=7")
    throughputs = [one for one in added.trainer.callbacks if isinstance(one, Throughput)]  # type: ignore[attr-defined]
    assert [one.every_n_steps for one in throughputs] == [7]


def test_names_are_taken_as_they_are_written(material: Any, workplace: Path) -> None:
    with pytest.raises(ValueError, match=r"no option --trainer\.max_step "):
        command(material, "--trainer.max_step", "3")
    with pytest.raises(ValueError, match=r"Batches has no field 'mod'"):
        command(material, "--data.batches.mod", "packed")


def test_a_nested_field_can_be_null(material: Any, workplace: Path) -> None:
    assert command(material).datamodule.batches.documents == 4
    assert command(material, "--data.batches.documents", "null").datamodule.batches.documents is None


def test_files_merge_and_lists_are_appended_to(material: Any, workplace: Path) -> None:
    Path("one.yaml").write_text("trainer: {callbacks: [GradientNorm], max_steps: 2}")
    Path("two.yaml").write_text("trainer: {callbacks+: [LossSpike]}\nmodel: {init_args: {compile: true}}")
    made = command(material, "--config", "one.yaml", "--config", "two.yaml", "--trainer.max_steps", "3")
    assert [one.class_path.rsplit(".", 1)[1] for one in made.config.trainer.callbacks] == ["GradientNorm", "LossSpike"]
    assert (made.trainer.max_steps, made.model.plan.compile, made.model.plan.adapter.rank) == (3, True, 4)


def test_a_new_run_claims_a_folder_and_gives_it_back(material: Any, workplace: Path) -> None:
    Path("run/checkpoints").mkdir(parents=True)
    Path("run/config.yaml").write_text("run: run")
    made = command(material, "--run", "run")
    assert made.run_folder.path == Path("run-2")
    assert made.trainer.default_root_dir == "run-2"
    made.write_config()
    assert yaml.safe_load(Path("run-2/config.yaml").read_text())["run"] == "run-2"
    made.release()
    assert not Path("run-2").exists()
    assert command(material, "--run", "run", go_on=True).run_folder.path == Path("run")


def test_a_measured_run_is_left_as_it_is(material: Any, workplace: Path) -> None:
    made = command(material, verb="validate", run=RunFolder(material.run))
    assert made.trainer.default_root_dir == str(material.run)
    assert made.trainer.loggers == []
    made.release()
    assert material.run.is_dir()
