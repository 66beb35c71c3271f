"""Predictions: what `lightllm predict` writes, a JSON line a document."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TextIO

from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor
from typing_extensions import override

from lightllm.batch import IGNORE_INDEX, PADDING_DOCUMENT, TextBatch
from lightllm.generate import Decoding, generate

if TYPE_CHECKING:
    from lightllm.modules.base import LanguageModule


class Predictions(Callback):
    """Writes `RUN/predictions.jsonl` during `predict`, one line a document.

    A line has the document's `source` (`file:line`), and either its `loss` (mean per target token, in nats) and
    `tokens` (how many targets), or its `prompt` (what comes before the first target), the data's `target` and the
    network's `generation`. Further ranks write `predictions-1.jsonl`, ….

    Args:
        what: Losses or generations.
        decoding: How tokens are chosen.
    """

    def __init__(self, what: Literal["losses", "generations"] = "losses", decoding: Decoding | None = None) -> None:
        self.what = what
        self.decoding = decoding or Decoding()
        self._file: TextIO | None = None

    @override
    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        name = "predictions.jsonl" if trainer.is_global_zero else f"predictions-{trainer.global_rank}.jsonl"
        self._file = (Path(trainer.default_root_dir) / name).open("w", encoding="utf-8")

    @override
    def on_predict_batch_end(  # type: ignore[override]
        self,
        trainer: Trainer,
        pl_module: LanguageModule,
        outputs: Tensor,
        batch: TextBatch,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        assert self._file is not None
        datamodule: Any = trainer.datamodule  # type: ignore[attr-defined]
        rows = document_losses(outputs, batch) if self.what == "losses" else self._generations(pl_module, batch)
        for document, row in rows:
            source = datamodule.describe_document("predict", document)
            self._file.write(json.dumps({"source": source, **row}, ensure_ascii=False) + "\n")

    @override
    def on_predict_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        assert self._file is not None
        self._file.close()

    def _generations(self, module: LanguageModule, batch: TextBatch) -> list[tuple[int, dict[str, Any]]]:
        assert module.tokenizer is not None
        documents, prompts, targets = [], [], []
        for document, tokens, labels in _documents(batch):
            first = next(place for place, label in enumerate(labels) if label != IGNORE_INDEX)
            documents.append(document)
            prompts.append(tokens[: first + 1])
            targets.append(module.tokenizer.decode([label for label in labels if label != IGNORE_INDEX]))
        written = generate(module.built_network, module.tokenizer, prompts, self.decoding)
        return [
            (document, {"prompt": module.tokenizer.decode(prompt), "target": target, "generation": generation})
            for document, prompt, target, generation in zip(documents, prompts, targets, written, strict=True)
        ]


def document_losses(log_probabilities: Tensor, batch: TextBatch) -> list[tuple[int, dict[str, Any]]]:
    """Each document's mean loss and number of targets, from log probabilities `[batch, seq]`."""
    rows = []
    for document in batch["document_ids"].unique().tolist():
        if document == PADDING_DOCUMENT:
            continue
        targets = (batch["document_ids"] == document) & (batch["labels"] != IGNORE_INDEX)
        losses = -log_probabilities[targets]
        rows.append((document, {"loss": losses.mean().item(), "tokens": int(targets.sum())}))
    return rows


def _documents(batch: TextBatch) -> list[tuple[int, list[int], list[int]]]:
    """Id, tokens and labels of each document that has a target."""
    found = []
    for document in batch["document_ids"].unique().tolist():
        inside = batch["document_ids"] == document
        labels = batch["labels"][inside].tolist()
        if document != PADDING_DOCUMENT and any(label != IGNORE_INDEX for label in labels):
            found.append((document, batch["input_ids"][inside].tolist(), labels))
    return found
