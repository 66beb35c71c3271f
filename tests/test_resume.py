"""A run that is killed at any moment and begun again ends as if it had never been: weights, optimizer, metrics."""

from __future__ import annotations

import csv
import os
import random
import signal
import subprocess
import sys
import time
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from command_line import forked_lightllm
from killable_run import Recipe, equal, kill, logged_steps, make_material, wait_until_training
from lightning.pytorch import Callback

from lightllm.callbacks import MagnitudePruning, SparseGPTPruning, WandaPruning
from lightllm.checkpoint_io import newest_checkpoint

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="forks and kills")

EPOCHS = {"max_epochs": 2}


def gradually() -> list[Callback]:
    return [MagnitudePruning(0.6, schedule="cubic", begin=2, end=0.9, every_n_steps=2)]


def twice() -> list[Callback]:
    return [
        SparseGPTPruning(pattern="2:4", begin=7, num_documents=20, leave_out=["mlp"]),
        WandaPruning(0.5, leave_out=["attn"]),
    ]


RUNS: dict[str, tuple[int, dict[str, Any]]] = {
    "full": (12, {"trainer": {**EPOCHS, "val_check_interval": 5}}),
    "full-workers-accumulate": (4, {"workers": 2, "trainer": {**EPOCHS, "accumulate_grad_batches": 2}}),
    "full-streaming": (4, {"streaming": True, "trainer": {"max_epochs": -1, "max_steps": 24}}),
    "full-streaming-workers": (3, {"streaming": True, "workers": 2, "trainer": {"max_epochs": -1, "max_steps": 24}}),
    "full-pruned": (4, {"callbacks": gradually, "trainer": {**EPOCHS, "accumulate_grad_batches": 2}}),
    "lora-pruned": (
        4,
        {"lora": True, "dropout": 0.0, "callbacks": twice, "trainer": {**EPOCHS, "val_check_interval": 4}},
    ),
    "lora": (4, {"lora": True, "mode": "sorted", "trainer": EPOCHS}),
    "lora-workers": (4, {"lora": True, "workers": 2, "trainer": {**EPOCHS, "val_check_interval": 4}}),
}
"""How often each run is killed, and what it is."""


@pytest.fixture(scope="module")
def material(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("material")
    make_material(folder)
    return folder


def assert_same_run(run: Path, whole: Path) -> None:
    ours, theirs = (torch.load(folder / "checkpoints" / "last.ckpt", weights_only=True) for folder in (run, whole))
    for part in ("state_dict", "optimizer_states", "lr_schedulers", "random_numbers", "loops", "callbacks"):
        assert equal(ours[part], theirs[part]), part
    assert (run / "metrics.csv").read_text() == (whole / "metrics.csv").read_text()
    names = [sorted(path.name for path in (folder / "checkpoints").iterdir()) for folder in (run, whole)]
    assert names[0] == names[1]
    if "best.ckpt" in names[0]:
        best = [torch.load(folder / "checkpoints" / "best.ckpt", weights_only=True) for folder in (run, whole)]
        assert best[0]["global_step"] == best[1]["global_step"]


def wait_for_a_half_written_file(run: Path, seconds: float = 2.0) -> None:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline and not any((run / "checkpoints").glob("*.tmp-*")):
        pass


@pytest.mark.parametrize("name", RUNS)
def test_killed_run_ends_as_the_uninterrupted_one(tmp_path: Path, material: Path, name: str) -> None:
    kills, options = RUNS[name]
    recipe = Recipe(material, **options)
    recipe.finish(tmp_path / "whole")
    steps = logged_steps(tmp_path / "whole")
    chance, run = random.Random(name), tmp_path / "killed"
    killed = half_written = 0
    for number, step in enumerate(sorted(chance.sample(range(steps - 4), kills))):
        process = recipe.start(run)
        wait_until_training(process, run, step)
        time.sleep(chance.uniform(0, 0.03))
        if number % 2:
            wait_for_a_half_written_file(run)
        kill(process, group=bool(number % 3))
        killed += process.exitcode == -signal.SIGKILL
        half_written += len(list((run / "checkpoints").glob("*.tmp-*")))
    assert killed >= kills - 2  # a run may end before this process gets its turn to kill it
    assert half_written or kills < 10
    recipe.finish(run)
    assert_same_run(run, tmp_path / "whole")
    rows = [line.split(",")[0] for line in (run / "metrics.csv").read_text().splitlines()[1:]]
    assert rows == [str(step) for step in range(steps)]


@pytest.mark.parametrize("streaming", [False, True])
def test_two_ranks_stop_together_and_go_on_exactly(tmp_path: Path, material: Path, streaming: bool) -> None:
    """Each rank has its own random numbers and its own place in a stream."""
    limits = {"max_epochs": -1, "max_steps": 12, "accumulate_grad_batches": 2}
    recipe = Recipe(material, streaming=streaming, trainer=limits)

    def join(processes: list[BaseProcess]) -> list[int | None]:
        for process in processes:
            process.join()
        return [process.exitcode for process in processes]

    assert join(recipe.start_ranks(tmp_path / "whole", 2)) == [0, 0]
    first = recipe.start_ranks(tmp_path / "run", 2)
    wait_until_training(first[0], tmp_path / "run", steps=3)
    os.kill(first[1].pid or 0, signal.SIGTERM)  # one hears of it, both stop
    assert join(first) == [143, 143]
    second = recipe.start_ranks(tmp_path / "run", 2)
    wait_until_training(second[0], tmp_path / "run", steps=logged_steps(tmp_path / "run") + 3)
    for process in second:
        kill(process)
    assert join(recipe.start_ranks(tmp_path / "run", 2)) == [0, 0]
    assert_same_run(tmp_path / "run", tmp_path / "whole")


def test_uninterrupted_run_is_the_same_each_time(tmp_path: Path, material: Path) -> None:
    """What the comparisons above rest on; and that they can fail: another seed makes another run."""
    recipe = Recipe(material, trainer=EPOCHS)
    recipe.finish(tmp_path / "one")
    recipe.finish(tmp_path / "two")
    assert_same_run(tmp_path / "one", tmp_path / "two")
    newest = newest_checkpoint(tmp_path / "one" / "checkpoints")
    assert newest == tmp_path / "one" / "checkpoints" / f"step={logged_steps(tmp_path / 'one')}.ckpt"


def test_checkpoint_of_an_adapter_is_small_and_complete(tmp_path: Path, material: Path) -> None:
    recipe = Recipe(material, lora=True, trainer=EPOCHS)
    recipe.finish(tmp_path)
    saved = torch.load(tmp_path / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]
    assert saved
    assert all("lora_" in name for name in saved)
    network = sum(path.stat().st_size for path in (material / "network").glob("*.safetensors"))
    assert sum(tensor.nbytes for tensor in saved.values()) < network / 4


def write_config(path: Path, material: Path) -> None:
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
    network = {"architecture": "llama", "fields": {**sizes, "attention_dropout": 0.2}}
    data = {
        "train": str(material / "train.jsonl"),
        "val": str(material / "val.jsonl"),
        "tokenizer": str(material / "network"),
        "max_length": 24,
        "batches": {"tokens": 96},
        "reading": {"cache": str(material / "cache"), "processes": 1},
    }
    optimizer = {"class_path": "torch.optim.AdamW", "init_args": {"lr": 1e-3}}
    config = {
        "trainer": {**EPOCHS, "accelerator": "cpu", "log_every_n_steps": 1, "val_check_interval": 5},
        "checkpoint": {"every_n_train_steps": 1},
        "model": {
            "class_path": "CausalPretraining",
            "init_args": {"network": {"class_path": "FromConfig", "init_args": network}, "optimizer": optimizer},
        },
        "data": {"class_path": "TextData", "init_args": data},
    }
    path.write_text(yaml.safe_dump(config))


def curves(run: Path) -> list[tuple[str, str, str]]:
    with (run / "metrics.csv").open() as file:
        return [(row["step"], row["train/loss"], row["val/loss"]) for row in csv.DictReader(file)]


def test_command_line_goes_on_after_a_signal_and_a_kill(
    tmp_path: Path, material: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    config, whole, run = tmp_path / "config.yaml", tmp_path / "whole", tmp_path / "run"
    write_config(config, material)
    process = forked_lightllm("fit", "--config", str(config), "--run", str(whole))
    process.join()
    assert process.exitcode == 0

    process = forked_lightllm("fit", "--config", str(config), "--run", str(run))
    wait_until_training(process, run, steps=4)
    os.kill(process.pid or 0, signal.SIGTERM)
    process.join()
    assert process.exitcode == 128 + signal.SIGTERM
    assert f"lightllm fit --resume {run}" in capfd.readouterr().err

    process = forked_lightllm("fit", "--resume", str(run))
    wait_until_training(process, run, steps=logged_steps(run) + 4)
    kill(process)
    assert process.exitcode == -signal.SIGKILL

    resumed = subprocess.run([sys.executable, "-m", "lightllm", "fit", "--resume", str(run)], capture_output=True)
    assert resumed.returncode == 0, resumed.stderr.decode()
    ours, theirs = (torch.load(f / "checkpoints" / "last.ckpt", weights_only=True) for f in (run, whole))
    assert equal(ours["state_dict"], theirs["state_dict"])
    assert equal(ours["optimizer_states"], theirs["optimizer_states"])
    assert curves(run) == curves(whole)
