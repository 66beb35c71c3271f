"""Objectives over tiny networks, documents of unequal length and number of targets, and batches cut from them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from lightning.pytorch import LightningDataModule
from lightning.pytorch.cli import OptimizerCallable
from tiny_architectures import small_fields
from torch.utils.data import DataLoader
from transformers import PreTrainedTokenizerBase
from typing_extensions import override

from lightllm.batch import Document, TextBatch, pack_documents, pad_documents
from lightllm.models import Adapter, FromConfig, Network
from lightllm.modules import FineTuning, LanguageModule

VOCABULARY = 40


def scratch(architecture: str = "llama", **fields: Any) -> FromConfig:
    """Two layers of width 32 with random weights, large enough to matter."""
    return FromConfig(architecture, small_fields(architecture, vocab_size=VOCABULARY, **fields))


def adamw(learning_rate: float = 1e-2, weight_decay: float = 0.1) -> OptimizerCallable:
    """AdamW, still without its parameters."""
    return lambda parameters: torch.optim.AdamW(parameters, lr=learning_rate, weight_decay=weight_decay)


def objective(network: Network | None = None, adapter: Adapter | None = None, **fields: Any) -> LanguageModule:
    """Fine-tuning of a network that is built already, always with the same weights."""
    torch.manual_seed(0)
    module = FineTuning(network or scratch(), adapter, **({"optimizer": adamw()} | fields))
    module.configure_model()
    return module


def documents(count: int = 12, seed: int = 1) -> list[Document]:
    """Of 3 to 12 tokens, of which a random part are targets, but at least the last."""
    generator = torch.Generator().manual_seed(seed)
    made = []
    for index in range(count):
        length = int(torch.randint(3, 13, (), generator=generator))
        targets = torch.rand(length, generator=generator) < 0.6
        targets[-1] = True
        made.append(Document(torch.randint(VOCABULARY, (length,), generator=generator), targets, index))
    return made


def cut(made: Sequence[Document], sizes: Sequence[int], packed: bool = False) -> list[TextBatch]:
    """Batches of so many documents each, one to a row or all in one row."""
    assert sum(sizes) == len(made)
    batches, begin = [], 0
    for size in sizes:
        part = list(made[begin : begin + size])
        batches.append(pack_documents([part]) if packed else pad_documents(part))
        begin += size
    return batches


class Batches(LightningDataModule):
    """Gives out training batches as they are, with what an objective asks a datamodule for."""

    def __init__(
        self,
        train: Sequence[TextBatch],
        *,
        tokenizer: PreTrainedTokenizerBase | None = None,
        mode: str = "sorted",
        max_length: int = 16,
    ) -> None:
        super().__init__()
        self.train = list(train)
        self.tokenizer = tokenizer
        self.max_length = max_length
        self.batches = type("Mode", (), {"mode": mode})

    @override
    def train_dataloader(self) -> Any:
        return DataLoader(self.train, batch_size=None)  # type: ignore[arg-type]


class MeasuredBatches(Batches):
    """With batches for validation, test and prediction: the same ones."""

    def __init__(self, train: Sequence[TextBatch], val: Sequence[TextBatch], **fields: Any) -> None:
        super().__init__(train, **fields)
        self.val = list(val)

    @override
    def val_dataloader(self) -> Any:
        return DataLoader(self.val, batch_size=None)  # type: ignore[arg-type]

    @override
    def test_dataloader(self) -> Any:
        return self.val_dataloader()

    @override
    def predict_dataloader(self) -> Any:
        return self.val_dataloader()
