from __future__ import annotations

import csv
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from command_line import lightllm, refused

from lightllm.cli import main
from lightllm.models import Pretrained
from lightllm.runs import RunFolder


def curve(run: Path, name: str) -> dict[int, float]:
    """A metric by step."""
    with (run / "metrics.csv").open() as file:
        return {int(row["step"]): float(row[name]) for row in csv.DictReader(file) if row.get(name)}


def last_weights(run: Path) -> dict[str, Any]:
    return dict(torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"])


def same_weights(one: Path, other: Path) -> bool:
    first, second = last_weights(one), last_weights(other)
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def test_a_run_folder_holds_all_that_later_commands_need(material: Any) -> None:
    config = yaml.safe_load((material.run / "config.yaml").read_text())
    assert config["model"]["init_args"]["adapter"]["init_args"]["targets"] == "all-linear", "defaults are written out"
    assert config["trainer"]["max_steps"] == 4
    assert "config" not in config
    assert list(curve(material.run, "train/loss")) == [0, 1, 2, 3]
    assert list(curve(material.run, "val/loss")) == [1, 3]
    assert {"best.ckpt", "last.ckpt"} <= {file.name for file in (material.run / "checkpoints").iterdir()}
    assert "chat_template.jinja" in {file.name for file in (material.run / "tokenizer").iterdir()}


def test_what_a_run_prints(material: Any, workplace: Path) -> None:
    result = subprocess.run(
        [sys.executable, "-m", "lightllm", "fit", "--config", str(material.recipe), "--run", "mine"],
        capture_output=True,
        text=True,
        check=True,
    )
    begin = [
        r"run folder: mine",
        r"train: messages format, 20 rows",
        r"train: 16 documents, [\d,]+ positions in 4 batches, .*",
        r"val: 4 documents, [\d,]+ positions in 1 batch, .*",
        r"network: 29\.5k parameters, 3\.7k of them train, float32",
        r"done after 4 steps: mine; best val/loss [\d.]+",
        r"next: lightllm chat mine    lightllm validate mine    lightllm export mine",
    ]
    told = result.stderr.splitlines()
    assert len(told) == len(begin), result.stderr
    for line, pattern in zip(told, begin, strict=True):
        assert re.fullmatch(pattern, line)
    assert all(re.match(r"validated at step [24]/4: loss ", line) for line in result.stdout.splitlines())


def test_a_run_beside_others_gets_a_number(material: Any, workplace: Path) -> None:
    for _ in range(2):
        lightllm("fit", "--config", material.recipe, "--trainer.max_steps", 1)
    assert sorted(run.name for run in (workplace / "runs").iterdir()) == ["recipe", "recipe-2"]
    assert yaml.safe_load((workplace / "runs/recipe-2/config.yaml").read_text())["run"] == "runs/recipe-2"


def test_resuming_ends_as_if_the_run_had_not_stopped(material: Any, workplace: Path) -> None:
    shutil.copytree(material.run, "stopped")
    lightllm("fit", "--resume", "stopped", "--trainer.max_steps", 7)
    lightllm("fit", "--config", material.recipe, "--run", "whole", "--trainer.max_steps", 7)
    assert yaml.safe_load(Path("stopped/config.yaml").read_text())["trainer"]["max_steps"] == 7
    assert same_weights(workplace / "stopped", workplace / "whole")
    assert curve(workplace / "stopped", "train/loss") == curve(workplace / "whole", "train/loss")


def test_resume_auto_begins_a_run_and_then_goes_on_with_it(material: Any, workplace: Path) -> None:
    for steps in (1, 3):
        lightllm("fit", "--resume", "auto", "--config", material.recipe, "--trainer.max_steps", steps)
    assert os.listdir("runs") == ["recipe"]
    assert list(curve(workplace / "runs/recipe", "train/loss")) == [0, 1, 2]


def test_a_run_that_was_killed_while_it_replaced_its_checkpoint_goes_on_from_the_former(
    material: Any, workplace: Path, caplog: pytest.LogCaptureFixture
) -> None:
    shutil.copytree(material.run, "killed")
    newest = RunFolder("killed").newest_checkpoint()
    for other in newest.parent.iterdir():
        if other != newest:
            other.unlink()
    newest.rename(f"{newest}.tmp-former")
    with caplog.at_level("INFO"):
        lightllm("fit", "--resume", "killed", "--trainer.max_steps", 5)
    assert f"resumed from {newest}" in caplog.text
    assert list(curve(workplace / "killed", "train/loss")) == [0, 1, 2, 3, 4]


def test_a_run_that_was_killed_before_its_first_checkpoint_begins_again(material: Any, workplace: Path) -> None:
    Path("killed").mkdir()
    shutil.copy(material.run / "config.yaml", "killed")
    lightllm("fit", "--resume", "killed")
    assert same_weights(workplace / "killed", material.run)


def test_a_run_that_is_refused_leaves_no_folder(
    material: Any, workplace: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = ["fit", "--config", material.recipe]
    assert "no such file or folder: nothing.jsonl" in refused(capsys, *recipe, "--data.train", "nothing.jsonl")
    assert "warm-up of 9 steps" in refused(capsys, *recipe, "--model.schedule.warmup", 9)
    assert "no strategy 'dpp' (did you mean 'ddp'?)" in refused(capsys, *recipe, "--trainer.strategy", "dpp")
    assert not Path("runs").exists() or not os.listdir("runs")


def test_a_trial_leaves_nothing_behind(material: Any, workplace: Path) -> None:
    lightllm("fit", "--config", material.recipe, "--trainer.fast_dev_run", 1)
    assert os.listdir() == []


def test_validation_of_a_run_is_that_of_its_best_checkpoint(
    material: Any, workplace: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lightllm("validate", material.run)
    assert measured(capsys.readouterr().out, "val/loss") == pytest.approx(min(curve(material.run, "val/loss").values()))
    lightllm("validate", material.run, "--weights", "newest")
    assert measured(capsys.readouterr().out, "val/loss") == pytest.approx(curve(material.run, "val/loss")[3])
    assert "give best, newest or a file" in refused(capsys, "validate", material.run, "--weights", "bset")


def test_a_network_is_measured_as_it_comes(material: Any, workplace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lightllm("validate", "--config", material.recipe)
    untrained = measured(capsys.readouterr().out, "val/loss")
    assert untrained > curve(material.run, "val/loss")[1]
    assert os.listdir() == []


def test_test_data_is_named(material: Any, workplace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "nothing to test on: set data.test" in refused(capsys, "test", material.run)
    lightllm("test", material.run, "--data.test", material.chats)
    assert measured(capsys.readouterr().out, "test/loss") > 0


def measured(table: str, name: str) -> float:
    """A number of the table that Lightning prints."""
    match = re.search(rf"{name}\W+([\d.]+)", table)
    assert match, table
    return float(match[1])


def test_predict_writes_a_line_a_document(material: Any, workplace: Path) -> None:
    shutil.copytree(material.run, "run")
    lightllm("predict", "run", "--data.test", material.chats)
    losses = [json.loads(line) for line in Path("run/predictions.jsonl").read_text().splitlines()]
    assert [row["source"] for row in losses] == [f"{material.chats}:{line}" for line in range(1, 21)]
    assert all(row["loss"] > 0 and row["tokens"] > 3 for row in losses)
    what = ["--predictions.what", "generations", "--predictions.decoding", "{max_new_tokens: 5}"]
    lightllm("predict", "run", "--data.test", material.chats, *what)
    rows = [json.loads(line) for line in Path("run/predictions.jsonl").read_text().splitlines()]
    assert len(rows) == 20
    assert (rows[0]["target"].strip(), "What is a whale?" in rows[0]["prompt"]) == ("A mighty thing.", True)
    assert isinstance(rows[0]["generation"], str)


def test_a_printed_configuration_can_be_run(material: Any, workplace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["fit", "--config", str(material.recipe), "--model.adapter.rank", "2", "--print_config"])
    assert not ended.value.code
    Path("printed.yaml").write_text(capsys.readouterr().out)
    lightllm("fit", "--config", "printed.yaml", "--trainer.fast_dev_run", 1)
    assert yaml.safe_load(Path("printed.yaml").read_text())["model"]["init_args"]["adapter"]["init_args"]["rank"] == 2


@pytest.mark.parametrize(("flag", "file"), [("tensorboard", "tensorboard/events*"), ("wandb", "wandb/offline-run-*")])
def test_one_flag_logs_elsewhere_too(material: Any, workplace: Path, flag: str, file: str) -> None:
    lightllm("fit", "--config", material.recipe, "--run", "run", "--log", flag, "--trainer.max_steps", 1)
    assert list(Path("run").glob(file))
    assert list(curve(Path("run"), "train/loss")) == [0]


def test_resuming_names_a_run(material: Any, workplace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "'nowhere' is not a run folder" in refused(capsys, "fit", "--resume", "nowhere")
    assert "name the run folder first" in refused(capsys, "validate")
    assert "--resume: expected one argument" in refused(capsys, "fit", "--resume")


def test_a_refusal_comes_before_any_network(
    material: Any, workplace: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def build(self: Pretrained, request: object) -> None:
        raise AssertionError("a network was built")

    monkeypatch.setattr(Pretrained, "build", build)
    for wrong in (
        ["--model.adapter.rnk", "2"],
        ["--data.train", "nothing.jsonl"],
        ["--data.batches.documents", "null", "--data.batches.tokens", "5"],
        ["--model.network.name", "./nothing"],
        ["--trainer.strategy", "ddpp"],
    ):
        assert refused(capsys, "fit", "--config", material.recipe, *wrong).startswith("lightllm fit: ")


def test_ranks_that_a_run_starts_share_its_folder(material: Any, workplace: Path) -> None:
    (workplace / "runs/recipe").mkdir(parents=True)
    shutil.copy(material.run / "config.yaml", "runs/recipe")
    command = [
        sys.executable,
        "-m",
        "lightllm",
        "fit",
        "--config",
        str(material.recipe),
        "--config",
        "trainer/ddp.yaml",
    ]
    environment = {**os.environ, "GLOO_SOCKET_IFNAME": "lo"} if sys.platform == "linux" else dict(os.environ)
    subprocess.run([*command, "--trainer.devices", "2", "--trainer.max_steps", "1"], env=environment, check=True)
    assert sorted(os.listdir("runs")) == ["recipe", "recipe-2"]
    assert list(curve(workplace / "runs/recipe-2", "train/loss")) == [0]
    assert os.listdir("runs/recipe") == ["config.yaml"]
