"""The run's loggers: a CSV file that survives being killed, and an offline W&B run that is read back."""

from __future__ import annotations

import csv
import os
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
from lightning.pytorch.loggers import TensorBoardLogger, WandbLogger

from lightllm.loggers import RunCSVLogger, loggers, tensorboard_logger, wandb_logger


def rows(folder: Path) -> list[dict[str, str]]:
    with (folder / "metrics.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def logged(folder: Path, *steps: int) -> RunCSVLogger:
    logger = RunCSVLogger(folder)
    for step in steps:
        logger.log_metrics({"epoch": 0, "train/loss": step / 10}, step)
    return logger


def test_every_row_is_on_disk_at_once(tmp_path: Path) -> None:
    logged(tmp_path, 0, 5)
    assert rows(tmp_path) == [
        {"step": "0", "epoch": "0", "train/loss": "0.0"},
        {"step": "5", "epoch": "0", "train/loss": "0.5"},
    ]


def test_columns_that_come_later_and_values_of_the_same_step(tmp_path: Path) -> None:
    logger = logged(tmp_path, 0, 5)
    logger.log_metrics({"val/loss": 2.0, "epoch": 0}, 5)
    logger.log_metrics({"train/loss": 0.6, "a,b": 1.0}, 6)
    logger.log_metrics({"val/loss": 12345.678}, 6)
    assert rows(tmp_path) == [
        {"step": "0", "epoch": "0", "train/loss": "0.0", "val/loss": "", "a,b": ""},
        {"step": "5", "epoch": "0", "train/loss": "0.5", "val/loss": "2.0", "a,b": ""},
        {"step": "6", "epoch": "", "train/loss": "0.6", "val/loss": "12345.678", "a,b": "1.0"},
    ]


def test_a_shorter_value_leaves_nothing_of_the_longer_one(tmp_path: Path) -> None:
    logger = RunCSVLogger(tmp_path)
    logger.log_metrics({"x": 0.123456789}, 3)
    logger.log_metrics({"x": 1.0}, 3)
    assert (tmp_path / "metrics.csv").read_text() == "step,x\n3,1.0\n"


def test_without_a_step_rows_count_on(tmp_path: Path) -> None:
    logger = logged(tmp_path, 4)
    logger.log_metrics({"x": 1.0})
    assert [row["step"] for row in rows(tmp_path)] == ["4", "5"]


def test_another_process_goes_on_in_the_file(tmp_path: Path) -> None:
    logged(tmp_path, 0, 1)
    logged(tmp_path, 2)
    assert [row["step"] for row in rows(tmp_path)] == ["0", "1", "2"]


def test_rewind_drops_what_is_written_again(tmp_path: Path) -> None:
    logged(tmp_path, 0, 1, 2, 3)
    resumed = RunCSVLogger(tmp_path)
    resumed.rewind(2)
    resumed.log_metrics({"epoch": 0, "train/loss": 9.0}, 2)
    assert [(row["step"], row["train/loss"]) for row in rows(tmp_path)] == [("0", "0.0"), ("1", "0.1"), ("2", "9.0")]


def test_rewind_without_a_file_makes_none(tmp_path: Path) -> None:
    RunCSVLogger(tmp_path).rewind(0)
    assert not list(tmp_path.iterdir())


def test_a_file_cut_anywhere_is_repaired(tmp_path: Path) -> None:
    whole = logged(tmp_path, 0, 1).path.read_bytes()
    for length in range(len(whole) + 1):
        (tmp_path / "metrics.csv").write_bytes(whole[:length])
        num_kept = max(whole[:length].count(b"\n") - 1, 0)
        resumed = RunCSVLogger(tmp_path)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            resumed.log_metrics({"train/loss": 7.0}, 7)
        cut_a_row = b"\n" in whole[:length] and not whole[:length].endswith(b"\n")
        assert [str(one.message).endswith("dropped 1 row(s) that were not written to their end") for one in caught] == [
            True
        ] * cut_a_row
        assert [row["step"] for row in rows(tmp_path)] == [*["0", "1"][:num_kept], "7"]
        assert rows(tmp_path)[-1]["train/loss"] == "7.0"


def test_a_file_of_something_else_is_refused(tmp_path: Path) -> None:
    (tmp_path / "metrics.csv").write_text("name,age\na,1\n")
    with pytest.raises(ValueError, match="is no metrics file: its first column is 'name'"):
        RunCSVLogger(tmp_path).log_metrics({"x": 1.0}, 0)
    assert (tmp_path / "metrics.csv").read_text() == "name,age\na,1\n"


def test_killed_while_it_writes(tmp_path: Path) -> None:
    code = f"""
from pathlib import Path
from lightllm.loggers import RunCSVLogger
logger = RunCSVLogger(Path({str(tmp_path)!r}))
for step in range(10**9):
    logger.log_metrics({{"x": step / 7, f"column {{step // 50 % 40}}": 1.0}}, step)
    if step == 200:
        print("ready", flush=True)
"""
    process = subprocess.Popen([sys.executable, "-W", "ignore", "-c", code], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    process.kill()
    process.wait()
    process.stdout.close()
    resumed = RunCSVLogger(tmp_path)
    resumed.log_metrics({"x": 1.0}, 10**9)
    steps = [int(row["step"]) for row in rows(tmp_path)]
    assert steps[:-1] == list(range(len(steps) - 1))
    assert len(steps) > 200


def test_loggers_by_name(tmp_path: Path) -> None:
    made = loggers(["tensorboard", "csv", "wandb"], tmp_path / "run")
    assert [type(one) for one in made] == [RunCSVLogger, TensorBoardLogger, WandbLogger]
    assert [type(one) for one in loggers([], tmp_path)] == [RunCSVLogger]
    with pytest.raises(ValueError, match="no logger 'mlflow': choose from csv, tensorboard, wandb"):
        loggers(["mlflow"], tmp_path)  # type: ignore[list-item]


def test_tensorboard_goes_on_in_the_run_folder(tmp_path: Path) -> None:
    for value in (1.0, 2.0):
        logger = tensorboard_logger(tmp_path)
        logger.log_metrics({"x": value}, step=int(value))
        logger.finalize("success")
        logger.experiment.close()
    events = list((tmp_path / "tensorboard").glob("events.*"))
    assert len(events) == 2


def without_key(monkeypatch: pytest.MonkeyPatch, home: Path) -> None:
    for name in ("WANDB_API_KEY", "WANDB_MODE", "WANDB_BASE_URL", "NETRC"):
        monkeypatch.delenv(name, raising=False)
    home.mkdir(exist_ok=True)
    monkeypatch.setenv("HOME", str(home))


def mode_of(logger: WandbLogger) -> str:
    mode = logger._wandb_init["mode"]
    assert isinstance(mode, str)
    return mode


def test_without_a_key_wandb_is_offline_and_says_how_to_upload(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    without_key(monkeypatch, tmp_path / "home")
    with caplog.at_level("INFO"):
        logger = wandb_logger(tmp_path / "run")
    run_id = (tmp_path / "run" / "wandb_run_id").read_text().strip()
    assert mode_of(logger) == "offline"
    assert f"wandb sync {tmp_path}/run/wandb/offline-run-*-{run_id}" in caplog.text


def test_a_key_makes_wandb_go_online(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    without_key(monkeypatch, tmp_path / "home")
    netrc = tmp_path / "home" / ".netrc"
    netrc.write_text("machine elsewhere.example\n  login user\n  password secret\n")
    netrc.chmod(0o600)
    assert mode_of(wandb_logger(tmp_path)) == "offline"
    netrc.write_text("machine api.wandb.ai\n  login user\n  password secret\n")
    assert mode_of(wandb_logger(tmp_path)) == "online"
    netrc.unlink()
    monkeypatch.setenv("WANDB_API_KEY", "secret")
    assert mode_of(wandb_logger(tmp_path)) == "online"
    monkeypatch.setenv("WANDB_MODE", "offline")
    assert mode_of(wandb_logger(tmp_path)) == "offline"


def test_a_broken_netrc_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    without_key(monkeypatch, tmp_path)
    (tmp_path / ".netrc").write_text("machine\n")
    with pytest.warns(UserWarning, match=r"\.netrc cannot be read"):
        assert mode_of(wandb_logger(tmp_path / "run")) == "offline"


def test_a_resumed_wandb_run_keeps_its_id(tmp_path: Path) -> None:
    first, second = wandb_logger(tmp_path / "run"), wandb_logger(tmp_path / "run")
    assert first.version == second.version
    assert first.version != wandb_logger(tmp_path / "other").version


def test_the_checkpoints_folder_is_the_runs(tmp_path: Path) -> None:
    logger = RunCSVLogger(tmp_path)
    assert os.path.normpath(os.path.join(str(logger.save_dir), logger.name, logger.version)) == str(tmp_path)
