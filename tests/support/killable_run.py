"""Real training runs in a forked process, which can be killed at any moment and begun again where they were."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from multiprocessing import get_context
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import peft  # noqa: F401  (here rather than in each of the processes that are forked)
import torch
from lightning.fabric.plugins.environments import TorchElasticEnvironment
from lightning.fabric.utilities.warnings import PossibleUserWarning
from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything
from tiny_networks import TEXT, tiny_llama, tiny_tokenizer
from typing_extensions import override

from lightllm.callbacks import Checkpoint, Interruption, NonFiniteLoss, RandomState, RewindMetrics
from lightllm.checkpoint_io import newest_checkpoint
from lightllm.datamodules import Batches, Reading, TextData
from lightllm.loggers import RunCSVLogger
from lightllm.models import FromConfig, LoRA, Pretrained
from lightllm.modules import CausalPretraining, FineTuning, LanguageModule


class Pace(Callback):
    """Takes a little time at every batch, so that a run does not end before it can be killed."""

    @override
    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        time.sleep(0.01)


@dataclass(frozen=True)
class Recipe:
    """What a run is made of; `material` is the folder that `make_material` filled."""

    material: Path
    lora: bool = False
    workers: int = 0
    streaming: bool = False
    mode: Any = "packed"
    dropout: float = 0.2
    """Of LoRA."""
    callbacks: Callable[[], list[Callback]] = list
    """Makes those of the run that change its network."""
    trainer: dict[str, Any] = field(default_factory=dict)

    def module(self) -> LanguageModule:
        if self.lora:
            return FineTuning(Pretrained(str(self.material / "network")), LoRA(rank=4, dropout=self.dropout))
        fields = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
        return CausalPretraining(FromConfig("llama", {**fields, "attention_dropout": 0.2}))

    def data(self) -> TextData:
        return TextData(
            train=str(self.material / "train.jsonl"),
            val=str(self.material / "val.jsonl"),
            tokenizer=str(self.material / "network"),
            max_length=24,
            batches=Batches(mode=self.mode, tokens=96),
            reading=Reading(streaming=self.streaming, window=16, cache=str(self.material / "cache"), processes=1),
            num_workers=self.workers,
        )

    def train(self, run: Path) -> None:
        """Begin the run in the folder `run`, or go on with it, to its end."""
        seed_everything(7)
        trainer = Trainer(
            default_root_dir=run,
            accelerator="cpu",
            logger=RunCSVLogger(run),
            callbacks=[
                *self.callbacks(),
                RandomState(),
                RewindMetrics(),
                Interruption(),
                NonFiniteLoss(),
                Checkpoint(every_n_train_steps=1),
                Pace(),
            ],
            log_every_n_steps=1,
            enable_progress_bar=False,
            enable_model_summary=False,
            **self.trainer,
        )
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", PossibleUserWarning)
            newest = newest_checkpoint(run / "checkpoints")
            trainer.fit(self.module(), datamodule=self.data(), ckpt_path=newest, weights_only=True)

    def start(self, run: Path) -> BaseProcess:
        """`train` in a process of its own, which leads a process group."""
        process = get_context("fork").Process(target=_lead, args=(self, run))
        process.start()
        return process

    def start_ranks(self, run: Path, count: int) -> list[BaseProcess]:
        """`train` in so many processes, which share the work."""
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        processes = [
            get_context("fork").Process(target=_be_rank, args=(self, run, rank, count, port)) for rank in range(count)
        ]
        for process in processes:
            process.start()
        return list(processes)

    def finish(self, run: Path) -> None:
        """`train` in a process of its own, which must end well."""
        process = self.start(run)
        process.join()
        assert process.exitcode == 0


def _lead(recipe: Recipe, run: Path) -> None:
    os.setpgrp()
    recipe.train(run)


def _be_rank(recipe: Recipe, run: Path, rank: int, count: int, port: int) -> None:
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(count)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    ranks = {"devices": count, "strategy": "ddp", "plugins": [TorchElasticEnvironment()]}
    replace(recipe, trainer={**recipe.trainer, **ranks}).train(run)


def make_material(folder: Path) -> None:
    """Write a small network with its tokenizer, and text of which it can learn something."""
    tokenizer = tiny_tokenizer()
    tokenizer.save_pretrained(folder / "network")
    torch.manual_seed(0)
    tiny_llama(len(tokenizer)).save_pretrained(folder / "network")
    words = TEXT.split()
    for name, count in (("train", 90), ("val", 6)):
        generator = torch.Generator().manual_seed(count)
        lines = []
        for _ in range(count):
            length = int(torch.randint(2, 9, (), generator=generator))
            chosen = torch.randint(len(words), (length,), generator=generator).tolist()
            lines.append(json.dumps({"text": " ".join(words[index] for index in chosen)}) + "\n")
        (folder / f"{name}.jsonl").write_text("".join(lines))


def kill(process: BaseProcess, group: bool = False) -> None:
    """SIGKILL, to the process alone or with the workers of its data loader."""
    assert process.pid is not None
    with contextlib.suppress(ProcessLookupError):  # it has ended by itself
        (os.killpg if group else os.kill)(process.pid, signal.SIGKILL)
    process.join()


def wait_until_training(process: BaseProcess, run: Path, steps: int) -> None:
    """Wait until a process has logged a step, or has ended."""
    while process.is_alive() and logged_steps(run) < steps:
        time.sleep(0.001)


def logged_steps(run: Path) -> int:
    """Rows in metrics.csv."""
    path = run / "metrics.csv"
    return max(0, path.read_bytes().count(b"\n") - 1) if path.exists() else 0


def equal(one: Any, other: Any) -> bool:
    """Bitwise equality of what checkpoints are made of."""
    if isinstance(one, torch.Tensor):
        return torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(equal(one[key], other[key]) for key in one)
    if isinstance(one, (list, tuple)):
        return len(one) == len(other) and all(map(equal, one, other))
    return bool(one == other)
