"""Data with which batches can be told apart, and a run that notes them."""

from __future__ import annotations

import json
import multiprocessing
import os
import socket
import warnings
from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, TypeVar

import torch
from chat_tokenizer import byte_tokenizer
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor, nn
from typing_extensions import override

from lightllm.batch import IGNORE_INDEX, PADDING_DOCUMENT, TextBatch
from lightllm.datamodules import Batches, Reading, TextData

Result = TypeVar("Result")

Print = tuple[tuple[int, ...], tuple[int, ...]]
"""What a batch is known by: its tokens and its documents."""


def write_rows(folder: Path, names: str = "ab", count: int = 23) -> list[str]:
    """Files of texts of different lengths."""
    files = []
    for name in names:
        path = folder / f"{name}.jsonl"
        texts = [f"{name}{index} " * (1 + 7 * index % 11) for index in range(count)]
        path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
        files.append(str(path))
    return files


def text_data(folder: Path, batches: Batches | None = None, **fields: Any) -> TextData:
    """Data of `write_rows`, a token a byte; 32 positions in a row."""
    reading = {"cache": str(folder / "cache"), "val_fraction": 0.0, "window": 8} | fields.pop("reading", {})
    return TextData(
        write_rows(folder),
        tokenizer=byte_tokenizer(),
        max_length=fields.pop("max_length", 32),
        batches=batches or Batches(tokens=128),
        reading=Reading(**reading),
        **fields,
    )


def ready(data: TextData) -> TextData:
    """Data that is set up without a trainer."""
    data.prepare_data()
    data.setup("fit")
    return data


def print_of(batch: TextBatch) -> Print:
    return tuple(batch["input_ids"].flatten().tolist()), tuple(batch["document_ids"].flatten().tolist())


def targets(batches: Iterable[TextBatch]) -> Counter[tuple[int, int]]:
    """How often each target of each document occurs."""
    pairs = Counter[tuple[int, int]]()
    for batch in batches:
        here = batch["labels"] != IGNORE_INDEX
        pairs.update(zip(batch["document_ids"][here].tolist(), batch["labels"][here].tolist(), strict=True))
        assert (batch["document_ids"][here] != PADDING_DOCUMENT).all()
    return pairs


class NotingBatches(LightningModule):
    """Notes every batch that it is trained on."""

    tokenizer_source = None

    def __init__(self, read_estimate: bool = False) -> None:
        super().__init__()
        self.layer = nn.Linear(1, 1)
        self.read_estimate = read_estimate
        self.seen: list[Print] = []
        self.num_validated = 0

    @override
    def training_step(self, batch: TextBatch, batch_idx: int) -> Tensor:
        self.seen.append(print_of(batch))
        return self.layer(torch.ones(1)).sum()

    @override
    def validation_step(self, batch: TextBatch, batch_idx: int) -> None:
        self.num_validated += 1
        self.log("val/loss", 0.0, batch_size=1)

    @override
    def configure_optimizers(self) -> torch.optim.Optimizer:
        if self.read_estimate:
            assert self.trainer.estimated_stepping_batches
        return torch.optim.SGD(self.parameters(), 0.1)


class SaveIn(Callback):
    """Saves through the trainer in some hooks, to `folder/HOOK-STEP.ckpt`."""

    def __init__(self, folder: Path, hooks: Iterable[str]) -> None:
        for hook in hooks:
            setattr(self, hook, self._saving(folder, hook))

    def _saving(self, folder: Path, hook: str) -> Callable[..., None]:
        def save(trainer: Trainer, *_: Any, **__: Any) -> None:
            if trainer.global_step and trainer.fit_loop.epoch_loop._should_accumulate() is False:
                trainer.save_checkpoint(folder / f"{hook}-{trainer.fit_loop.total_batch_idx + 1}.ckpt")

        return save


def fit(
    data: TextData,
    module: NotingBatches | None = None,
    callbacks: Iterable[Callback] = (),
    resume: Path | None = None,
    **fields: Any,
) -> list[Print]:
    """Train, and return the batches that were seen."""
    module = module or NotingBatches()
    trainer = Trainer(
        accelerator="cpu",
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=any(isinstance(callback, ModelCheckpoint) for callback in callbacks),
        callbacks=list(callbacks),
        num_sanity_val_steps=0,
        **fields,
    )
    trainer.fit(module, datamodule=data, ckpt_path=resume, weights_only=True)
    return module.seen


def in_two_processes(function: Callable[[int], Result]) -> list[Result]:
    """What a function of the rank returns in each of two processes, which Lightning finds to be a group.

    They are forks of this one, so that nothing has to be imported again.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    context = multiprocessing.get_context("fork")
    results: Any = context.Queue()

    def work(rank: int) -> None:
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": "2", "NODE_RANK": "0"}
        os.environ["LOCAL_RANK"] = str(rank)
        results.put((rank, function(rank)))
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()

    processes = [context.Process(target=work, args=(rank,)) for rank in range(2)]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # Python 3.12 warns of forks beside threads
        for process in processes:
            process.start()
    try:
        found = dict(results.get(timeout=120) for _ in processes)
        for process in processes:
            process.join(timeout=60)
    finally:
        for process in processes:
            process.kill()
    return [found[rank] for rank in range(2)]
