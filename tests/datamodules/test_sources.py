from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import datasets
import pytest

from lightllm.datamodules.files import START
from lightllm.datamodules.rows import Row
from lightllm.datamodules.sources import HubSource, Source, find_sources


def values(source: Source) -> list[Any]:
    return [row.values for row, _ in source.rows() if isinstance(row, Row)]


def names(found: list[Source], folder: Path) -> list[str]:
    return [str(Path(source.name).relative_to(folder)) for source in found]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "sub").mkdir()
    for name in ("b.txt", "a.jsonl", "sub/c.TXT", "sub/notes.pdf"):
        (tmp_path / name).write_text('{"text": "x"}\n')
    return tmp_path


def test_files_folders_and_globs_come_in_a_fixed_order(folder: Path) -> None:
    assert names(find_sources(str(folder), "train"), folder) == ["a.jsonl", "b.txt", "sub/c.TXT"]
    assert names(find_sources(str(folder / "**/*.[tT][xX][tT]"), "train"), folder) == ["b.txt", "sub/c.TXT"]
    both = [str(folder / "sub"), str(folder / "a.jsonl")]
    assert names(find_sources(both, "train"), folder) == ["sub/c.TXT", "a.jsonl"]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("a.jsonI", r"data.train: no such file or folder: .*a.jsonI \(did you mean a.jsonl\?\)"),
        ("nowhere.txt", r"no such file or folder: .*; built-in sources are pydoc-"),
        ("*.csv", "no file matches"),
        ("sub/notes.pdf", r"can't read .*notes.pdf: files end in .txt, .md, .jsonl"),
        ("empty", "holds no file that can be read"),
    ],
)
def test_names_that_lead_nowhere(folder: Path, name: str, message: str) -> None:
    (folder / "empty").mkdir()
    with pytest.raises(ValueError, match=message):
        find_sources(str(folder / name), "train")


def test_misspelt_builtin_and_nothing_at_all() -> None:
    with pytest.raises(ValueError, match="did you mean pydoc-chat"):
        find_sources("pydoc-chats", "train")
    with pytest.raises(ValueError, match=r"no data: set data\.train to a file, folder, glob, hub id or one of"):
        find_sources([], "train")


def test_digest_is_that_of_the_content(folder: Path) -> None:
    (first,) = find_sources(str(folder / "a.jsonl"), "train")
    before = first.digest()
    (folder / "copy.jsonl").write_bytes((folder / "a.jsonl").read_bytes())
    assert find_sources(str(folder / "copy.jsonl"), "train")[0].digest() == before
    assert first.num_bytes() == (folder / "a.jsonl").stat().st_size
    (folder / "a.jsonl").write_text('{"text": "y"}\n')
    assert first.digest() != before


def test_parquet_rows_can_be_read_from_any_on(tmp_path: Path) -> None:
    rows = [{"text": f"row {index}", "label": index} for index in range(5)]
    datasets.Dataset.from_list(rows).to_parquet(str(tmp_path / "a.parquet"))
    (source,) = find_sources(str(tmp_path / "a.parquet"), "train")
    read = list(source.rows())
    assert [row.values for row, _ in read if isinstance(row, Row)] == rows
    assert [str(row.origin) for row, _ in read][-1] == f"{tmp_path / 'a.parquet'}:5"
    assert list(source.rows(read[1][1])) == read[2:]


@pytest.mark.parametrize("name", ["pydoc-chat", "pydoc-topics"])
def test_builtin_sources(name: str) -> None:
    (source,) = find_sources(name, "train")
    read = list(source.rows(START))
    assert len(read) > 50
    assert read[1][0].origin == (name, 2)
    assert list(source.rows(read[-2][1])) == read[-1:]
    assert source.digest() == find_sources(name, "val")[0].digest()
    assert source.num_bytes() == len(json.dumps(values(source)))


@pytest.mark.parametrize(
    ("name", "split", "asked"),
    [
        ("owner/corpus", "train", ("owner/corpus", None, "train")),
        ("owner/corpus", "val", ("owner/corpus", None, "validation")),
        ("owner/corpus:small", "train", ("owner/corpus", "small", "train")),
        ("owner/corpus:small#test[:5%]", "train", ("owner/corpus", "small", "test[:5%]")),
    ],
)
@pytest.mark.parametrize("streaming", [False, True])
def test_hub_ids(
    monkeypatch: pytest.MonkeyPatch, name: str, split: str, asked: tuple[str, str | None, str], streaming: bool
) -> None:
    table = datasets.Dataset.from_list([{"text": "a"}, {"text": "b"}])
    calls = []

    def load_dataset(*args: Any, **fields: Any) -> Any:
        calls.append((*args, fields["split"]))
        return table.to_iterable_dataset() if fields["streaming"] else table

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    monkeypatch.setattr(datasets, "get_dataset_split_names", lambda *_: ["train", "validation"])
    (source,) = find_sources(name, split, streaming)
    assert isinstance(source, HubSource)
    assert values(source) == [{"text": "a"}, {"text": "b"}]
    assert calls == [asked]
    assert source.num_bytes() is None
    if not streaming:
        assert source.digest() == source.digest()


def test_hub_id_without_the_split_or_the_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    (source,) = find_sources("owner/corpus", "val")
    with pytest.raises(ValueError, match=r"data\.val: owner/corpus is no file, and can't be had from the hub"):
        list(source.rows())
    monkeypatch.setattr(datasets, "get_dataset_split_names", lambda *_: ["train"])
    with pytest.raises(ValueError, match=r"has no split for val: write owner/corpus#SPLIT, one of \['train'\]"):
        list(source.rows())
