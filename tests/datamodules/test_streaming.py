from __future__ import annotations

from collections import Counter
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
from data_run import Print, print_of, ready, targets, text_data, write_rows

from lightllm.batch import pad_documents
from lightllm.datamodules import Batches
from lightllm.datamodules.plan import Rules
from lightllm.datamodules.sources import FileSource
from lightllm.datamodules.streaming import Stream, StreamedBatches, _WindowIterator
from lightllm.datamodules.tokenization import RowEncoder


def stream_of(folder: Path, batches: Batches | None = None, **fields: Any) -> Stream:
    data = ready(text_data(folder))
    defaults: dict[str, Any] = {
        "sources": [FileSource(name) for name in write_rows(folder)],
        "encoder": RowEncoder(data.encode, 1, 300),
        "rules": Rules(batches or Batches(tokens=128), 32, 0, split=True),
        "window": 8,
        "limit": None,
        "bad_rows": "stop",
        "padding_token": 0,
        "rank": 0,
        "num_ranks": 1,
    }
    return Stream(**(defaults | fields))


def prints(iterator: _WindowIterator, count: int | None = None) -> list[Print]:
    return [print_of(batch) for batch in islice(iterator, count)]


@pytest.mark.parametrize("batches", [Batches("packed", 128), Batches("sorted", 128), Batches(documents=4)])
def test_shards_together_have_every_target_once(tmp_path: Path, batches: Batches) -> None:
    documents = ready(text_data(tmp_path)).train_documents
    expected = Counter[tuple[str, int]]()
    for index in documents.examples.ravel().tolist():
        for (_, token), count in targets([pad_documents([documents[index]])]).items():
            expected[str(documents.origin(index)), token] += count
    stream = stream_of(tmp_path, batches)
    for epoch in (0, 1):
        found = Counter[tuple[str, int]]()
        for shard in range(3):
            for (document, token), count in targets(_WindowIterator(stream, epoch, shard, 3)).items():
                found[str(stream.origin(document)), token] += count
        assert found == expected


def test_epochs_and_windows_have_orders_of_their_own(tmp_path: Path) -> None:
    stream = stream_of(tmp_path)
    first, again, second = (prints(_WindowIterator(stream, epoch, 0, 1)) for epoch in (0, 0, 1))
    assert first == again
    assert first != second
    other = replace(stream, rules=replace(stream.rules, seed=1))
    assert prints(_WindowIterator(other, 0, 0, 1)) != first


@pytest.mark.parametrize("suffix", [".jsonl", ".csv"])
def test_any_place_is_found_again(tmp_path: Path, suffix: str) -> None:
    stream = stream_of(tmp_path)
    if suffix == ".csv":
        (tmp_path / "c.csv").write_text("text\n" + "".join(f"row {index}\n" for index in range(40)))
        stream = replace(stream, sources=[FileSource(str(tmp_path / "c.csv")), *stream.sources])
    for shard in range(2):
        iterator = _WindowIterator(stream, 1, shard, 2)
        places, seen = [iterator.state_dict()], []
        for batch in iterator:
            seen.append(print_of(batch))
            places.append(iterator.state_dict())
        assert len(seen) > 5
        for index, place in enumerate(places):
            resumed = _WindowIterator(stream, 0, shard, 2)
            resumed.load_state_dict(place)
            assert resumed.state_dict() == place
            assert prints(resumed) == seen[index:]


def test_limit_counts_rows_of_all_windows(tmp_path: Path) -> None:
    stream = stream_of(tmp_path, limit=19)
    seen = {document for document, _ in targets(_WindowIterator(stream, 0, 0, 1))}
    assert len(seen) == 19
    iterator = _WindowIterator(stream, 0, 0, 1)
    whole = prints(_WindowIterator(stream, 0, 0, 1))
    assert prints(iterator, 3) == whole[:3]
    resumed = _WindowIterator(stream, 0, 0, 1)
    resumed.load_state_dict(iterator.state_dict())
    assert prints(resumed) == whole[3:]


def test_ranks_have_different_windows_and_no_end(tmp_path: Path) -> None:
    streams = [stream_of(tmp_path, rank=rank, num_ranks=2) for rank in range(2)]
    seen: list[Counter[int]] = []
    for stream in streams:
        batches = list(islice(iter(StreamedBatches(stream, 0)), 40))
        assert len(batches) == 40
        seen.append(Counter(document for document, _ in targets(batches[:6])))
    assert not set(seen[0]) & set(seen[1])


def test_place_of_an_endless_stream_is_found_again_in_a_later_epoch(tmp_path: Path) -> None:
    stream = stream_of(tmp_path, num_ranks=2)
    iterator = _WindowIterator(stream, 0, 0, 2)
    prints(iterator, 17)
    place = iterator.state_dict()
    assert place["epoch"] > 0
    rest = prints(iterator, 17)
    resumed = _WindowIterator(stream, 0, 0, 2)
    resumed.load_state_dict(place)
    assert prints(resumed, 17) == rest


def test_endless_stream_without_a_window_for_a_rank_is_refused(tmp_path: Path) -> None:
    stream = stream_of(tmp_path, num_ranks=2, window=100)
    assert prints(_WindowIterator(stream, 0, 0, 2), 3)
    with pytest.raises(ValueError, match="fewer than 2 windows of 100 rows, one for each worker of each process"):
        prints(_WindowIterator(stream, 0, 1, 2), 1)


def test_bad_rows_stop_or_are_said_and_skipped(tmp_path: Path) -> None:
    stream = stream_of(tmp_path)
    Path(stream.sources[0].name).write_text('{"text": "good"}\n{broken\n{"text": ""}\n')
    with pytest.raises(ValueError, match=r"bad row: .*a.jsonl:2: broken JSON.*\n.*reading.bad_rows=skip"):
        prints(_WindowIterator(stream, 0, 0, 1))
    skipping = replace(stream, bad_rows="skip")
    with pytest.warns(UserWarning, match=r"skipped 2 bad rows, the first of them .*a.jsonl:2: broken JSON"):
        seen = {document for document, _ in targets(_WindowIterator(skipping, 0, 0, 1))}
    assert len(seen) == 1 + 23


def test_windows_without_a_document_are_passed_over(tmp_path: Path) -> None:
    lines = ['{"text": ""}'] * 20 + ['{"text": "good"}'] + ['{"text": ""}'] * 20
    (tmp_path / "sparse.jsonl").write_text("\n".join(lines))
    stream = stream_of(tmp_path, sources=[FileSource(str(tmp_path / "sparse.jsonl"))], bad_rows="skip")
    with pytest.warns(UserWarning, match="skipped"):
        (batch,) = _WindowIterator(stream, 0, 0, 1)
    assert str(stream.origin(int(batch["document_ids"].max()))).endswith("sparse.jsonl:21")
