"""A kind of rows of one's own, and a callback: a glossary, and an end to training once it is known well enough."""

from __future__ import annotations

from dataclasses import dataclass

from lightning.pytorch import Callback, LightningModule, Trainer
from typing_extensions import override

from lightllm.batch import Document
from lightllm.datamodules import BadRow, DocumentData, Row


@dataclass(eq=False, kw_only=True)
class GlossaryData(DocumentData):
    """Terms and what they mean, one a row; the meaning is learned."""

    separator: str = ": "
    """What stands between a term and its meaning."""

    @override
    def encode(self, row: Row) -> list[Document]:
        """The row as one document, whose targets are the meaning and the end."""
        missing = [name for name in ("term", "meaning") if not row.values.get(name)]
        if missing:
            raise BadRow(row.origin, f"no {' and no '.join(missing)}")
        tokenizer = self.loaded_tokenizer
        term = tokenizer(row.values["term"] + self.separator).input_ids
        meaning = [*tokenizer(row.values["meaning"], add_special_tokens=False).input_ids, tokenizer.eos_token_id]
        return [Document(term + meaning, [False] * len(term) + [True] * len(meaning))]


class GoodEnough(Callback):
    """Ends training when the validation loss is below a threshold.

    Args:
        threshold: In nats per target token.
    """

    def __init__(self, threshold: float = 0.5) -> None:
        self.threshold = threshold

    @override
    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not trainer.sanity_checking and trainer.callback_metrics["val/loss"] < self.threshold:
            trainer.should_stop = True
