from __future__ import annotations

import logging
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny_networks import tiny_llama, token_rows
from torch import nn

from lightllm.batch import Document
from lightllm.losses import Divergence
from lightllm.models import Pretrained
from lightllm.teaching import write
from lightllm.teaching.key import Lesson
from lightllm.teaching.store import TeacherStore
from lightllm.teaching.write import Asking, document_groups

VOCAB = 320


@dataclass
class Store:
    """Documents of random tokens, of which every third is no target."""

    digest: str = "digest"
    rows: torch.Tensor = field(default_factory=lambda: token_rows(VOCAB, 12, 17))

    def piece(self, document: int, start: int = 0, length: int | None = None) -> Document:
        assert start == 0
        tokens = self.rows[document][: None if length is None else length + 1]
        return Document(tokens, torch.arange(len(tokens)) % 3 != 1, document)


@dataclass
class Chosen:
    store: Store
    examples: np.ndarray
    lengths: np.ndarray


def documents() -> Chosen:
    """Three of twelve, in pairs and out of order, one of them cut short."""
    return Chosen(Store(), np.array([[7, 2], [4, 11]]), np.array([[16, 9], [16, 16]]))


def asking(k: int, packed: bool, vocabulary: int = VOCAB, temperature: float = 2.0) -> Asking:
    torch.manual_seed(0)
    teacher, student = tiny_llama(VOCAB), tiny_llama(vocabulary)
    lesson = Lesson(Pretrained("owner/teacher"), None, k, temperature, vocabulary)
    return Asking(teacher, student.train(), lesson, Divergence(temperature=temperature), packed)


def log_probabilities(network: nn.Module, document: int, length: int) -> torch.Tensor:
    tokens = Store().rows[document][:length][None]
    with torch.no_grad():
        return (network(tokens).logits[0] / 2.0).log_softmax(-1)


@pytest.mark.parametrize("positions", [4096, 30])
@pytest.mark.parametrize("packed", [True, False])
def test_equals_the_teacher_asked_document_by_document(
    packed: bool, positions: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(write, "POSITIONS", positions)
    it = asking(5, packed)
    it.write(documents(), tmp_path)
    store, num_targets = TeacherStore(tmp_path), 0
    for document, length in ((7, 16), (2, 9), (4, 16), (11, 16)):
        log_p = log_probabilities(it.teacher, document, length)
        positions_asked = [t for t in range(length) if (t + 1) % 3 != 1]
        found = store.find(torch.tensor([(document << 32) + t for t in positions_asked]))
        expected = log_p[positions_asked].topk(5, dim=1)
        assert torch.equal(found.ids, expected.indices)
        torch.testing.assert_close(found.log_probabilities, expected.values, rtol=1e-3, atol=1e-3)
        tail = 1 - expected.values.exp().sum(1)
        torch.testing.assert_close(found.log_tail.exp(), tail, rtol=2e-3, atol=1e-4)
        num_targets += len(positions_asked)
        with pytest.raises(KeyError):
            store.find(torch.tensor([(document << 32) + length]))
    assert store.num_targets == num_targets


def test_it_says_how_far_it_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(write, "POSITIONS", 5)
    caplog.set_level(logging.INFO)
    asking(5, packed=True).write(documents(), tmp_path)
    said = [record.message for record in caplog.records if "was asked about" in record.message]
    assert said == [f"the teacher was asked about {share}% of the documents" for share in (20, 50, 70)]


def test_the_students_divergence_is_measured(tmp_path: Path) -> None:
    it = asking(VOCAB, packed=True)
    it.write(documents(), tmp_path / ".")
    total, count = 0.0, 0
    for document, length in ((7, 16), (2, 9), (4, 16), (11, 16)):
        teacher, student = (log_probabilities(one.eval(), document, length) for one in (it.teacher, it.student))
        asked = [t for t in range(length) if (t + 1) % 3 != 1]
        total += 4 * float((teacher.exp() * (teacher - student)).sum(-1)[asked].sum())
        count += len(asked)
    measured = TeacherStore(tmp_path).measured
    assert measured.whole == pytest.approx(total / count, rel=1e-4)
    assert measured.kept == pytest.approx(total / count, rel=2e-3)  # of all tokens, in half precision
    assert measured.tail == 0.0


def test_the_student_is_left_as_it_was_and_few_tokens_say_less(tmp_path: Path) -> None:
    it = asking(4, packed=True)
    it.write(documents(), tmp_path)
    assert it.student.training
    measured = TeacherStore(tmp_path).measured
    assert 0 < measured.kept < measured.whole
    assert 0 < measured.tail < 1


def test_a_smaller_vocabulary_of_the_students(tmp_path: Path) -> None:
    it = asking(5, packed=True, vocabulary=VOCAB - 8)
    chosen = replace(documents(), store=Store(rows=token_rows(VOCAB - 8, 12, 17)))
    it.write(chosen, tmp_path)
    store = TeacherStore(tmp_path)
    found = store.find(torch.tensor([(7 << 32) + 1]))
    with torch.no_grad():
        logits = it.teacher(chosen.store.rows[7][None]).logits[0, 1, : VOCAB - 8]
    expected = (logits / 2.0).log_softmax(-1).topk(5)
    assert torch.equal(found.ids[0], expected.indices)
    torch.testing.assert_close(found.log_probabilities[0], expected.values, rtol=1e-3, atol=1e-3)
    assert store.vocabulary == VOCAB - 8


def test_groups_hold_every_document_once_in_ascending_order(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(write, "POSITIONS", 30)
    assert document_groups(documents()) == [[(2, 9), (4, 16)], [(7, 16)], [(11, 16)]]
    monkeypatch.setattr(write, "POSITIONS", 5)
    assert document_groups(documents()) == [[(2, 9)], [(4, 16)], [(7, 16)], [(11, 16)]]
