"""Runs of several ranks through the command: trained, killed, resumed, measured, exported and asked."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from command_line import lightllm, refused, save_chats, save_small_network, settle_in
from ranks import run_on_ranks
from transformers import AutoModelForCausalLM

from lightllm.checkpoint_io import read_checkpoint
from lightllm.cli import main

DATA = ["--data.train", "chats.jsonl", "--data.reading.val_fraction=0.2", "--data.max_length=64"]
FIT = [
    "fit",
    "--config",
    "finetune/lora.yaml",
    "--model.network.name",
    "network",
    "--model.network.dtype=float32",
    *DATA,
]
RANKS = ["--trainer.devices=2", "--trainer.accelerator=cpu", "--data.batches.documents=4"]
STEPS = ["--trainer.max_steps=8", "--checkpoint.every_n_train_steps=2", "--trainer.val_check_interval=4"]

ROWS = ["--data.batches.documents=null", "--data.batches.tokens=256", "--trainer.strategy.microbatches=4"]
"""Batches of four rows, for a pipeline to take apart."""


@pytest.fixture(scope="module")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    with pytest.MonkeyPatch.context() as patch:
        folder = tmp_path_factory.mktemp("workplace")
        settle_in(folder, patch)
        save_small_network(folder / "network")
        save_chats(folder / "chats.jsonl", 120)
        yield folder


def run(*arguments: object) -> int:
    return main([str(argument) for argument in arguments])


def arguments(name: str, overlay: str) -> list[str]:
    more = ROWS if overlay == "pipeline.yaml" else []
    return [*FIT, "--config", f"parallel/{overlay}", *RANKS, *STEPS, *more, "--run", f"runs/{name}"]


def fit(name: str, overlay: str) -> None:
    assert run_on_ranks(run, 2, *arguments(name, overlay)) == [0, 0]


def measured(text: str) -> float:
    return float(text.split("val/loss")[1].split()[1])


@pytest.mark.parametrize("overlay", ["sharded.yaml", "tensor.yaml", "pipeline.yaml"])
def test_a_run_of_two_ranks_is_a_run_folder_like_any(
    workplace: Path, overlay: str, capfd: pytest.CaptureFixture[str]
) -> None:
    name = overlay.removesuffix(".yaml")
    fit(name, overlay)
    folder = workplace / "runs" / name
    assert (folder / "checkpoints" / "best.ckpt").is_dir() == (overlay != "pipeline.yaml"), "files of whole networks"
    capfd.readouterr()
    assert run_on_ranks(run, 2, "validate", folder) == [0, 0]
    by_two = measured(capfd.readouterr().out)
    lightllm("validate", folder, "--trainer.strategy=auto", "--trainer.devices=1")
    assert measured(capfd.readouterr().out) == pytest.approx(by_two, rel=1e-5)
    lightllm("export", folder)
    lightllm("generate", folder, "What is a whale?")
    state = read_checkpoint(folder / "checkpoints" / "best.ckpt")["state_dict"]
    exported = AutoModelForCausalLM.from_pretrained(folder / "export").model.layers[1].mlp.up_proj.weight
    plain = AutoModelForCausalLM.from_pretrained("network").model.layers[1].mlp.up_proj.weight
    prefix = "network.base_model.model.model.layers.1.mlp.up_proj.lora_"
    update = 2.0 * state[f"{prefix}B.default.weight"] @ state[f"{prefix}A.default.weight"]  # alpha 32 of rank 16
    assert update.abs().max() > 1e-4
    torch.testing.assert_close(exported, plain + update)


def killed(command: list[str], watched: Path) -> int:
    """Of two ranks, the second is killed in the middle of its work, once there is a checkpoint."""

    def kill() -> None:
        while not watched.exists():
            time.sleep(0.005)
        os.kill(os.getpid(), signal.SIGKILL)

    if torch.distributed.get_rank() == 1:
        threading.Thread(target=kill, daemon=True).start()
    return run(*command)


@pytest.mark.parametrize("overlay", ["sharded.yaml", "pipeline.yaml"])
def test_a_rank_that_is_killed_ends_the_others_and_the_run_goes_on(
    workplace: Path, overlay: str, capfd: pytest.CaptureFixture[str]
) -> None:
    whole, dead = f"whole-{overlay}", f"killed-{overlay}"
    fit(whole, overlay)
    checkpoints = workplace / "runs" / dead / "checkpoints"
    begin = time.monotonic()
    with pytest.raises(AssertionError, match="rank 1 ended with -9"):
        run_on_ranks(killed, 2, arguments(dead, overlay), checkpoints / "step=4.ckpt")
    assert time.monotonic() - begin < 60
    said = capfd.readouterr().err
    assert "lightllm fit: rank 0 stops, because another rank of the run has ended or cannot be reached" in said
    assert "go on with lightllm fit --resume RUN" in said
    assert run_on_ranks(run, 2, "fit", "--resume", f"runs/{dead}") == [0, 0]
    ours, theirs = (read_checkpoint(workplace / "runs" / name / "checkpoints/last.ckpt") for name in (dead, whole))
    assert ours["global_step"] == theirs["global_step"] == 8
    assert all(torch.equal(ours["state_dict"][key], value) for key, value in theirs["state_dict"].items())


def test_what_cannot_be_spread_is_refused_before_a_network_is_loaded(
    workplace: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    staged = [*FIT, "--config", "parallel/pipeline.yaml", *RANKS]
    assert run_on_ranks(run, 2, *staged) == [2, 2]
    assert "batches have 1 rows, and microbatches is 8" in capfd.readouterr().err
    alone = [*FIT, "--config", "parallel/tensor.yaml", "--trainer.accelerator=cpu"]
    assert "tensor 2 does not make the 1 ranks" in refused(capfd, *alone, "--trainer.devices=1")
    assert not (workplace / "runs" / "lora").exists()


@pytest.mark.parametrize(
    "strategy",
    ["--trainer.strategy=fsdp", "--trainer.strategy={class_path: lightning.pytorch.strategies.FSDPStrategy}"],
)
def test_lightnings_own_sharding_is_refused_on_a_cpu(
    workplace: Path, capsys: pytest.CaptureFixture[str], strategy: str
) -> None:
    said = refused(capsys, *FIT, "--trainer.accelerator=cpu", strategy)
    assert "works on GPUs only; lightllm.parallel.ParallelStrategy shards on any device" in said
