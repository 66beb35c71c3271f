"""Cutting a batch into the micro-batches of a pipeline, by rows."""

from __future__ import annotations

import torch
from torch import Tensor

from lightllm.batch import IGNORE_INDEX, PADDING_DOCUMENT, TextBatch


def split_rows(batch: TextBatch, count: int) -> list[TextBatch]:
    """Cut a batch into at most so many parts of consecutive rows, as even as can be; none is empty."""
    count = min(count, len(batch["input_ids"]))
    parts = {name: tensor.tensor_split(count) for name, tensor in _tensors(batch).items()}
    return [_batch({name: tensors[index] for name, tensors in parts.items()}) for index in range(count)]


def equal_microbatches(batch: TextBatch, count: int) -> list[TextBatch]:
    """Cut a batch into exactly so many parts of equally many rows.

    What is missing are rows of padding, from which nothing is learned and which change no sum: stages hand each other
    tensors of one shape.
    """
    parts = split_rows(batch, count)
    rows = max(len(part["input_ids"]) for part in parts)
    width = batch["input_ids"].shape[1]
    parts += [_padding(0, width, batch["input_ids"])] * (count - len(parts))
    return [_filled_up(part, rows) for part in parts]


def check_rows(datamodule: object, count: int) -> None:
    """Refuse data whose batches are known to have fewer rows than there are micro-batches.

    Args:
        datamodule: One with the fields of `DocumentData`; of another, nothing is known.
        count: How many micro-batches.

    Raises:
        ValueError: They have.
    """
    batches, length = getattr(datamodule, "batches", None), getattr(datamodule, "max_length", 0)
    tokens, documents = getattr(batches, "tokens", None), getattr(batches, "documents", None)
    if not isinstance(tokens, int):
        return
    cure = f"data.batches.documents to at least {count}"
    rows = documents
    if getattr(batches, "mode", "") == "packed":  # in which so many documents make one row
        rows = tokens // length if documents is None else 1
        cure = f"data.batches.tokens to at least {count * length}, and leave out data.batches.documents"
    if rows is not None and rows < count:
        raise ValueError(
            f"batches have {rows} rows, and microbatches is {count}: the rest would be padding. Set {cure}; or lower "
            "trainer.strategy.init_args.microbatches"
        )


def _filled_up(part: TextBatch, rows: int) -> TextBatch:
    missing = rows - len(part["input_ids"])
    if not missing:
        return part
    padding = _tensors(_padding(missing, part["input_ids"].shape[1], part["input_ids"]))
    return _batch({name: torch.cat([tensor, padding[name]]) for name, tensor in _tensors(part).items()})


def _padding(rows: int, width: int, like: Tensor) -> TextBatch:
    """Rows `[rows, width]` of nothing: one document's positions, so that no mask is needed for them."""
    return TextBatch(
        input_ids=like.new_zeros((rows, width)),
        labels=like.new_full((rows, width), IGNORE_INDEX),
        position_ids=torch.arange(width, device=like.device, dtype=like.dtype).repeat(rows, 1),
        document_ids=like.new_full((rows, width), PADDING_DOCUMENT),
    )


def _tensors(batch: TextBatch) -> dict[str, Tensor]:
    return {
        "input_ids": batch["input_ids"],
        "labels": batch["labels"],
        "position_ids": batch["position_ids"],
        "document_ids": batch["document_ids"],
    }


def _batch(tensors: dict[str, Tensor]) -> TextBatch:
    return TextBatch(
        input_ids=tensors["input_ids"],
        labels=tensors["labels"],
        position_ids=tensors["position_ids"],
        document_ids=tensors["document_ids"],
    )
