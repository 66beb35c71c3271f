from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from labelled_texts import labelled_rows, save_labelled

from lightllm.datamodules.episode_source import EpisodeShape, EpisodeSource
from lightllm.datamodules.files import Cursor
from lightllm.datamodules.labelled_rows import LabelledRows
from lightllm.datamodules.sources import FileSource

CLASSES = [f"class {number}" for number in (1, 2, 4, 5)]


def source(folder: Path, shape: EpisodeShape, seed: int = 0, of_each: int = 9) -> EpisodeSource:
    file = save_labelled(folder / "rows.jsonl", labelled_rows(6, of_each))
    return EpisodeSource(LabelledRows([FileSource(file)], "text", "label"), CLASSES, shape, 12, seed)


def test_an_episode_is_of_some_classes_and_no_text_is_twice_in_it(tmp_path: Path) -> None:
    made = source(tmp_path, EpisodeShape(ways=3, shots=2, queries=4))
    kinds = {row["text"]: row["label"] for row in labelled_rows(6, 9)}
    episodes: list[Any] = [row for row, _ in made.rows()]
    assert len(episodes) == 12
    seen = set()
    for row in episodes:
        texts, labels = row.values["texts"], row.values["labels"]
        assert labels == [2 * number + query for number in range(3) for query in (0, 0, 1, 1, 1, 1)]
        classes = [kinds[text] for text in texts]
        assert all(len(set(classes[begin : begin + 6])) == 1 for begin in (0, 6, 12))
        assert len(set(classes)) == 3
        assert set(classes) <= set(CLASSES)
        seen.add(tuple(texts))
    assert len(seen) == 12


def test_episodes_are_those_of_the_seed(tmp_path: Path) -> None:
    shape = EpisodeShape(2, 1, 1)
    one = [row for row, _ in source(tmp_path, shape).rows()]
    assert one == [row for row, _ in source(tmp_path, shape).rows()]
    assert one[5:] == [row for row, _ in source(tmp_path, shape).rows(Cursor(5, 1))]
    assert one != [row for row, _ in source(tmp_path, shape, seed=1).rows()]
    assert source(tmp_path, shape).digest() != source(tmp_path, EpisodeShape(2, 1, 2)).digest()


def test_episodes_that_cannot_be_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="episodes are of 5 classes, and 4 of 4 have 2 rows"):
        next(source(tmp_path, EpisodeShape(5, 1, 1)).rows())
    with pytest.raises(ValueError, match="and 0 of 4 have 12 rows"):
        next(source(tmp_path, EpisodeShape(2, 6, 6)).rows())
    with pytest.raises(ValueError, match=r"data\.ways is 1"):
        EpisodeShape(1, 5, 5)
