"""Predictions: what `lightllm predict` writes, a JSON line a document."""

from __future__ import annotations

import json
from itertools import takewhile
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor
from typing_extensions import override

from lightllm.batch import IGNORE_INDEX, PADDING_DOCUMENT, TextBatch
from lightllm.generate import Decoding, generate
from lightllm.parallel.spreading import SpreadsWeights

if TYPE_CHECKING:
    from lightllm.modules.base import LanguageModule


class Predictions(Callback):
    """Writes `RUN/predictions.jsonl` when `predict` is over, one line a document, in the documents' order.

    A line has the document's `source` (`file:line`), and either its `loss` (mean per target token, in nats) and
    `tokens` (how many targets), or its `prompt` (what comes before the first target), the `target` that the data has
    there and the network's `generation`. Further ranks write `predictions-1.jsonl`, …. What was found before a failure
    or Ctrl-C is written too.

    Args:
        what: Losses or generations.
        decoding: How tokens are chosen.
    """

    def __init__(self, what: Literal["losses", "generations"] = "losses", decoding: Decoding | None = None) -> None:
        self.what = what
        self.decoding = decoding or Decoding()
        self._losses: dict[int, DocumentLoss] = {}
        self._generations: dict[int, dict[str, str]] = {}

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage == "predict" and self.what == "generations" and isinstance(trainer.strategy, SpreadsWeights):
            raise ValueError(
                f"generations differ in length from rank to rank, and under {type(trainer.strategy).__name__} ranks "
                "work in step: set trainer.strategy to ddp or auto"
            )

    @override
    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._losses, self._generations = {}, {}

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
        if self.what == "generations":
            # Of a document in pieces, the first one met counts.
            self._generations = {**self._continue(pl_module, batch), **self._generations}
            return
        for document, loss in document_losses(outputs, batch).items():
            before = self._losses.get(document, DocumentLoss(0.0, 0))
            self._losses[document] = DocumentLoss(before.sum + loss.sum, before.tokens + loss.tokens)

    @override
    def on_predict_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._write(trainer)

    @override
    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        if self._losses or self._generations:
            self._write(trainer)

    def _write(self, trainer: Trainer) -> None:
        datamodule: Any = trainer.datamodule  # type: ignore[attr-defined]
        name = "predictions.jsonl" if trainer.is_global_zero else f"predictions-{trainer.global_rank}.jsonl"
        found: dict[int, dict[str, Any]] = {document: {**row} for document, row in self._generations.items()}
        for document, loss in self._losses.items():
            found[document] = {"loss": loss.sum / loss.tokens, "tokens": loss.tokens}
        path = Path(trainer.default_root_dir) / name
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("w", encoding="utf-8") as file:
            for document in sorted(found):
                row = {"source": datamodule.describe_document("predict", document), **found[document]}
                file.write(json.dumps(row, ensure_ascii=False) + "\n")
        self._losses, self._generations = {}, {}

    def _continue(self, module: LanguageModule, batch: TextBatch) -> dict[int, dict[str, str]]:
        """Prompt, target and generation of each document in the batch."""
        assert module.tokenizer is not None
        documents, prompts, targets = [], [], []
        for document, tokens, labels in _documents(batch):
            first = next(place for place, label in enumerate(labels) if label != IGNORE_INDEX)
            documents.append(document)
            prompts.append(tokens[: first + 1])
            answer = list(takewhile(lambda label: label != IGNORE_INDEX, labels[first:]))
            targets.append(module.tokenizer.decode(answer, skip_special_tokens=True))
        written = generate(module.built_network, module.tokenizer, prompts, self.decoding)
        return {
            document: {"prompt": str(module.tokenizer.decode(prompt)), "target": str(target), "generation": generation}
            for document, prompt, target, generation in zip(documents, prompts, targets, written, strict=True)
        }


class DocumentLoss(NamedTuple):
    """What a document's targets cost."""

    sum: float
    """Of minus the log probabilities, in nats."""
    tokens: int
    """How many targets."""


def document_losses(log_probabilities: Tensor, batch: TextBatch) -> dict[int, DocumentLoss]:
    """The loss of each document that has targets in the batch, from log probabilities `[batch, seq]`."""
    losses = {}
    for document in batch["document_ids"].unique().tolist():
        targets = (batch["document_ids"] == document) & (batch["labels"] != IGNORE_INDEX)
        if document != PADDING_DOCUMENT and bool(targets.any()):
            losses[document] = DocumentLoss(-log_probabilities[targets].double().sum().item(), int(targets.sum()))
    return losses


def _documents(batch: TextBatch) -> list[tuple[int, list[int], list[int]]]:
    """Id, tokens and labels of each document that has a target in the batch."""
    found = []
    for document in batch["document_ids"].unique().tolist():
        inside = batch["document_ids"] == document
        labels = batch["labels"][inside].tolist()
        if document != PADDING_DOCUMENT and any(label != IGNORE_INDEX for label in labels):
            found.append((document, batch["input_ids"][inside].tolist(), labels))
    return found
