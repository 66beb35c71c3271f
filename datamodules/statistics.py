"""What came of a split, in numbers and in a sentence."""

from __future__ import annotations

from dataclasses import dataclass

from lightllm.datamodules.documents import DocumentSet
from lightllm.datamodules.plan import Plan


@dataclass(frozen=True)
class Statistics:
    """Numbers of a split."""

    num_documents: int
    num_positions: int
    """Positions that the documents fill, padding not included; tokens less one a document."""
    num_truncated: int
    """Documents whose end was cut off at `max_length`."""
    num_dropped: int
    """Documents left out because they have no target within `max_length`."""
    num_bad_rows: int
    """Rows of the source that were skipped."""
    num_batches: int
    """Batches in an epoch, of all ranks."""
    padding_share: float
    """Share of the positions in these batches that hold padding."""

    def describe(self, max_length: int) -> str:
        """All of it in a line."""
        parts = [
            f"{_count(self.num_documents, 'document')}, {self.num_positions:,} positions in "
            f"{self.num_batches:,} {'batch' if self.num_batches == 1 else 'batches'}, "
            f"{self.padding_share:.1%} padding"
        ]
        if self.num_truncated:
            parts.append(f"{_count(self.num_truncated, 'document')} truncated to {max_length} positions")
        if self.num_dropped:
            parts.append(f"{self.num_dropped:,} left out: nothing to learn within {max_length} positions")
        if self.num_bad_rows:
            parts.append(f"{_count(self.num_bad_rows, 'bad row')} skipped")
        return "; ".join(parts)


def measure(documents: DocumentSet, plan: Plan) -> Statistics:
    """Count a split's documents, and what an epoch makes of them."""
    return Statistics(
        num_documents=len(documents),
        num_positions=documents.num_positions,
        num_truncated=documents.num_truncated,
        num_dropped=documents.num_dropped,
        num_bad_rows=documents.store.encoded.num_bad_rows,
        num_batches=len(plan),
        padding_share=plan.padding_share(),
    )


def require_documents(split: str, documents: DocumentSet, max_length: int) -> None:
    """Refuse a split that is empty.

    Raises:
        ValueError: It has no documents; says what became of its rows.
    """
    if len(documents):
        return
    encoded = documents.store.encoded
    raise ValueError(
        f"{split}: no documents in {', '.join(documents.store.source_names[:3])}: {_count(encoded.num_rows, 'row')}, "
        f"{encoded.num_bad_rows:,} of them bad, and {_count(documents.num_dropped, 'document')} with nothing to learn "
        f"within max_length={max_length} positions"
    )


def _count(number: int, noun: str) -> str:
    return f"{number:,} {noun}{'s' * (number != 1)}"
