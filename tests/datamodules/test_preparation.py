from __future__ import annotations

import re
import time
from pathlib import Path

import pytest
from data_run import in_two_processes

from lightllm.batch import Document
from lightllm.datamodules.preparation import SHOWN, Reading, first_good_row, prepare_store
from lightllm.datamodules.rows import BadRow, Row
from lightllm.datamodules.sources import FileSource
from lightllm.datamodules.tokenization import RowEncoder


class Encoder:
    """Counts how many rows it encodes."""

    def __init__(self) -> None:
        self.count = 0

    def __call__(self, row: Row) -> list[Document]:
        self.count += 1
        if not row.values["text"]:
            raise BadRow(row.origin, "empty")
        ids = list(row.values["text"].encode())
        return [Document(ids, [True] * len(ids))]


def sources(folder: Path, *lines: str) -> list[FileSource]:
    path = folder / "a.jsonl"
    path.write_text("".join(line + "\n" for line in lines))
    return [FileSource(str(path))]


def test_rows_are_tokenised_once_for_the_same_content_and_settings(tmp_path: Path) -> None:
    encode = Encoder()
    encoder, reading = RowEncoder(encode, 1, 256), Reading(cache=str(tmp_path / "cache"))
    files = sources(tmp_path, '{"text": "one"}', '{"text": "two"}')
    first = prepare_store("train", list(files), encoder, "settings", reading)
    again = prepare_store("train", list(files), encoder, "settings", reading)
    assert encode.count == 2
    assert first.folder == again.folder
    prepare_store("train", list(files), encoder, "other settings", reading)
    assert encode.count == 4
    limited = prepare_store("train", list(files), encoder, "settings", Reading(cache=reading.cache, limit=1))
    assert (encode.count, len(limited)) == (5, 1)
    changed = prepare_store("train", list(sources(tmp_path, '{"text": "three"}')), encoder, "settings", reading)
    assert (encode.count, len(changed)) == (6, 1)
    moved = tmp_path / "moved.jsonl"
    (tmp_path / "a.jsonl").rename(moved)
    found = prepare_store("train", [FileSource(str(moved))], encoder, "settings", reading)
    assert encode.count == 6
    assert str(found.origin(0)) == f"{moved}:1"


def test_two_runs_that_start_together_tokenise_once(tmp_path: Path) -> None:
    log = tmp_path / "log"

    def encode(row: Row) -> list[Document]:
        with log.open("a") as file:
            file.write(f"{row.origin.line}\n")
        time.sleep(0.02)
        return [Document([1, row.origin.line], [True, True])]

    files = sources(tmp_path, *['{"text": "x"}'] * 20)

    def prepare(rank: int) -> tuple[str, list[int]]:
        reading = Reading(cache=str(tmp_path / "cache"))
        store = prepare_store("train", list(files), RowEncoder(encode, 1, 256), "", reading)
        return str(store.folder), store.encoded.tokens.tolist()

    first, second = in_two_processes(prepare)
    assert first == second
    assert len(first[1]) == 40
    assert log.read_text().splitlines() == [str(line) for line in range(1, 21)]


def test_cache_is_where_the_environment_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LIGHTLLM_CACHE", str(tmp_path / "elsewhere"))
    assert Reading().cache_root == tmp_path / "elsewhere"
    assert Reading(cache="~/here").cache_root == Path.home() / "here"
    monkeypatch.delenv("LIGHTLLM_CACHE")
    assert Reading().cache_root == Path.home() / ".cache" / "lightllm"


def test_bad_rows_stop_with_their_places_or_are_counted(tmp_path: Path) -> None:
    encoder, cache = RowEncoder(Encoder(), 1, 256), str(tmp_path / "cache")
    files = sources(tmp_path, '{"text": "good"}', "{broken", '{"text": ""}')
    message = (
        "train: 2 of 3 rows can't be used:\n"
        f"  {tmp_path}/a.jsonl:2: broken JSON: Expecting property name enclosed in double quotes "
        "(character 2 of the line)\n"
        f"  {tmp_path}/a.jsonl:3: empty\n"
        "Mend them, or have them skipped and counted: reading.bad_rows=skip"
    )
    for _ in range(2):  # the second time, from the cache
        with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
            prepare_store("train", list(files), encoder, "", Reading(cache=cache))
    store = prepare_store("train", list(files), encoder, "", Reading(cache=cache, bad_rows="skip"))
    assert (len(store), store.encoded.num_rows, store.encoded.num_bad_rows) == (1, 3, 2)


def test_many_bad_rows_are_counted_and_some_shown(tmp_path: Path) -> None:
    encoder = RowEncoder(Encoder(), 1, 256)
    files = sources(tmp_path, *["{"] * 250)
    with pytest.raises(ValueError, match="250 of 250 rows") as error:
        prepare_store("train", list(files), encoder, "", Reading(cache=str(tmp_path / "cache")))
    assert str(error.value).count("a.jsonl:") == SHOWN
    assert "… and 240 more" in str(error.value)


def test_first_good_row_is_one_that_can_be_encoded(tmp_path: Path) -> None:
    files = sources(tmp_path, "{broken", '{"text": ""}', '{"text": "good"}')
    row = first_good_row(list(files), Encoder())
    assert row is not None
    assert row.origin.line == 3
    assert first_good_row(list(sources(tmp_path, "{broken")), Encoder()) is None


@pytest.mark.parametrize(
    ("reading", "message"),
    [
        (Reading(limit=0), "reading.limit is 0"),
        (Reading(window=0), "reading.window is 0"),
        (Reading(processes=-1), "reading.processes is -1"),
        (Reading(val_fraction=1.0), "reading.val_fraction is 1.0"),
    ],
)
def test_senseless_numbers_are_refused(reading: Reading, message: str) -> None:
    Reading().check()
    with pytest.raises(ValueError, match=message):
        reading.check()
