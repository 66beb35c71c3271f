from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

from lightllm.batch import Document, pack_documents
from lightllm.losses import TopTokens
from lightllm.teaching.store import TeacherStore, target_places, write_teacher_store


def predictions(num_targets: int, k: int = 3, vocabulary: int = 50) -> TopTokens:
    logits = torch.randn(num_targets, vocabulary, generator=torch.Generator().manual_seed(num_targets))
    top = logits.log_softmax(1).topk(k, dim=1)
    return TopTokens(top.indices, top.values, (1 - top.values.exp().sum(1)).log())


def written(folder: Path, vocabulary: int = 50) -> tuple[TeacherStore, torch.Tensor, TopTokens]:
    places = (torch.tensor([2, 2, 2, 5, 9, 9]) << 32) + torch.tensor([1, 2, 7, 0, 3, 2**31 - 1])
    top = predictions(6)
    parts = [(places[part], TopTokens(*(tensor[part] for tensor in top))) for part in (slice(4), slice(4, 6))]
    folder.mkdir()
    write_teacher_store(folder, parts, 3, vocabulary, (0.5, 0.25))
    return TeacherStore(folder), places, top


def test_places_are_found_in_any_order(tmp_path: Path) -> None:
    store, places, top = written(tmp_path / "store")
    order = torch.tensor([5, 0, 3, 3, 1])
    found = store.find(places[order])
    assert torch.equal(found.ids, top.ids[order])
    torch.testing.assert_close(found.log_probabilities, top.log_probabilities[order], rtol=1e-3, atol=0.0)
    torch.testing.assert_close(found.log_tail, top.log_tail[order], rtol=1e-3, atol=0.0)
    assert found.log_probabilities.dtype == torch.float32


@pytest.mark.parametrize("absent", [(2 << 32) + 3, 0, (9 << 32) + 4, 10 << 32])
def test_a_place_that_is_not_there(tmp_path: Path, absent: int) -> None:
    store, places, _ = written(tmp_path / "store")
    with pytest.raises(KeyError) as raised:
        store.find(torch.cat([places[:2], torch.tensor([absent])]))
    assert raised.value.args == (2,)


@pytest.mark.parametrize(("vocabulary", "id_bytes"), [(50, 2), (2**16, 2), (2**16 + 1, 4)])
def test_bytes_and_what_was_measured(tmp_path: Path, vocabulary: int, id_bytes: int) -> None:
    store, _, top = written(tmp_path / "store", vocabulary)
    assert store.bytes_per_target == 8 + 3 * (id_bytes + 2) + 2
    on_disk = sum(os.path.getsize(file) for file in (tmp_path / "store").glob("*.bin"))
    assert on_disk == 6 * store.bytes_per_target
    assert (store.k, store.vocabulary, store.num_targets) == (3, vocabulary, 6)
    assert store.measured.tail == pytest.approx(float(top.log_tail.exp().mean()), rel=1e-6)
    assert (store.measured.whole, store.measured.kept) == (0.5, 0.25)
    assert "0.2500 nats, 0.5000 from all tokens" in store.describe()


def test_nothing_to_keep(tmp_path: Path) -> None:
    write_teacher_store(tmp_path, [], 3, 50, (0.0, 0.0))
    store = TeacherStore(tmp_path)
    assert store.find(torch.zeros(0, dtype=torch.int64)).ids.shape == (0, 3)
    with pytest.raises(KeyError):
        store.find(torch.zeros(1, dtype=torch.int64))


def test_places_of_a_packed_batch() -> None:
    flags = [False, False, True, True]
    rows = [[Document([5, 6, 7, 8], flags, 3), Document([9, 9], [False, True], 70_000)]]
    places = target_places(pack_documents(rows, length=6))
    assert places.tolist() == [(3 << 32) + 1, (3 << 32) + 2, 70_000 << 32]
