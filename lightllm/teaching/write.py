"""Asking a teacher: its forward passes over a split's documents, once, and what is kept of them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor, nn

from lightllm.batch import IGNORE_INDEX, Document, TextBatch, batch_to, pack_documents
from lightllm.losses import (
    Divergence,
    LogitTerms,
    TopTokens,
    linear_divergence,
    linear_top_token_divergence,
    linear_top_tokens,
)
from lightllm.models.anatomy import output_head
from lightllm.models.hidden_states import hidden_states
from lightllm.models.inference import inference, network_device
from lightllm.teaching.key import Documents, Lesson
from lightllm.teaching.store import target_places, write_teacher_store

POSITIONS = 4096
"""Positions that go through the networks at once, if no document has more."""

MEASURED_GROUPS = 8
"""So many of what goes through at once are also compared with the whole teacher."""


@dataclass(frozen=True)
class Asking:
    """Who is asked what, and how.

    Args:
        teacher: The teacher, built.
        student: The student, in the state in which it is measured.
        lesson: What is asked.
        divergence: How the student is going to be compared.
        packed: Whether documents share a row, as both networks can take them.
    """

    teacher: nn.Module
    student: nn.Module
    lesson: Lesson
    divergence: Divergence
    packed: bool

    @property
    def vocabulary(self) -> int:
        """Tokens that both know."""
        return min(self.lesson.vocabulary, len(output_head(self.teacher).weight))

    def write(self, documents: Documents, folder: Path) -> None:
        """Ask about every target of the documents, and write the answers into an existing, empty folder."""
        groups = document_groups(documents)
        chosen = np.unique(np.arange(MEASURED_GROUPS) * len(groups) // MEASURED_GROUPS)
        divergences = self._divergences([self._batch(documents, groups[index]) for index in chosen])
        write_teacher_store(folder, self._parts(documents, groups), self.lesson.k, self.vocabulary, divergences)

    def _parts(self, documents: Documents, groups: list[list[tuple[int, int]]]) -> Iterator[tuple[Tensor, TopTokens]]:
        """Places and answers, group by group; says every tenth how far it is."""
        said = 0
        for number, group in enumerate(groups):
            if 10 * number // len(groups) > said:
                said = 10 * number // len(groups)
                rank_zero_info(f"the teacher was asked about {10 * said}% of the documents")
            batch = self._batch(documents, group)
            yield target_places(batch), self.answers(batch)

    def answers(self, batch: TextBatch) -> TopTokens:
        """The teacher's likeliest tokens at a batch's targets."""
        head, size = output_head(self.teacher), self.vocabulary
        with inference(self.teacher):
            hidden = hidden_states(self.teacher, batch).to(head.weight.dtype)
            return linear_top_tokens(
                hidden,
                head.weight[:size],
                batch["labels"],
                self.lesson.k,
                temperature=self.lesson.temperature,
                bias=None if head.bias is None else head.bias[:size],
                softcap=head.softcap,
                logit_scale=head.logit_scale,
            )

    def _batch(self, documents: Documents, group: list[tuple[int, int]]) -> TextBatch:
        pieces = [documents.store.piece(document, 0, length) for document, length in group]
        rows: list[list[Document]] = [pieces] if self.packed else [[piece] for piece in pieces]
        return batch_to(pack_documents(rows), network_device(self.teacher))

    def _divergences(self, batches: list[TextBatch]) -> tuple[float, float]:
        """The student's divergence from the whole teacher, and from what is kept, in nats per target token."""
        ours, theirs = output_head(self.student), output_head(self.teacher)
        student, teacher = LogitTerms(*ours[1:]), LogitTerms(*theirs[1:])
        options = {**vars(self.divergence), "num_tokens": self.vocabulary, "student": student}
        whole = kept = num_targets = 0.0
        for batch in batches:
            labels, top = batch["labels"], self.answers(batch)
            rounded = TopTokens(top.ids, top.log_probabilities.half(), top.log_tail.half())
            with inference(self.student), inference(self.teacher):
                hidden = hidden_states(self.student, batch)
                known = hidden_states(self.teacher, batch).to(theirs.weight.dtype)
                pair = (hidden, ours.weight)
                whole += float(linear_divergence(*pair, known, theirs.weight, labels, teacher=teacher, **options))
                kept += float(linear_top_token_divergence(*pair, rounded, labels, **options))
            num_targets += int((labels != IGNORE_INDEX).sum())
        return whole / max(1.0, num_targets), kept / max(1.0, num_targets)


def document_groups(documents: Documents) -> list[list[tuple[int, int]]]:
    """All documents with their lengths, by ascending id, in groups that go through a network at once."""
    ids, lengths = documents.examples.ravel(), documents.lengths.ravel()
    order = np.argsort(ids, kind="stable")
    groups: list[list[tuple[int, int]]] = []
    filled = POSITIONS
    for document, length in zip(ids[order].tolist(), lengths[order].tolist(), strict=True):
        if filled + length > POSITIONS:
            groups.append([])
            filled = 0
        groups[-1].append((document, length))
        filled += length
    return groups
