from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from labelled_texts import labelled_rows, save_labelled
from tiny_encoders import wordpiece_tokenizer

from lightllm.batch import PADDING_DOCUMENT
from lightllm.datamodules import Batches, EpisodeData, Reading
from lightllm.modules.text_groups import classes_of_texts


def data(folder: Path, **fields: Any) -> EpisodeData:
    made = EpisodeData(
        save_labelled(folder / "rows.jsonl", labelled_rows(8, 6)),
        tokenizer=wordpiece_tokenizer(),
        reading=Reading(cache=str(folder / "cache"), processes=1),
        **(
            {"max_length": 16, "ways": 2, "shots": 2, "queries": 1, "episodes": 7, "measured_episodes": 3}
            | {"class_split": (0.5, 0.25, 0.25)}
            | fields
        ),
    )
    made.prepare_data()
    made.setup("fit")
    return made


def test_a_batch_is_an_episode_of_the_splits_own_classes(tmp_path: Path) -> None:
    made = data(tmp_path)
    known: dict[str, set[str]] = {}
    loaders = {"train": made.train_dataloader(), "val": made.val_dataloader(), "test": made.test_dataloader()}
    for split, loader in loaders.items():
        known[split] = set()
        batches: list[Any] = list(loader)
        assert len(batches) == {"train": 7}.get(split, 3)
        for batch in batches:
            assert classes_of_texts(batch).tolist() == [0, 0, 1, 2, 2, 3]
            ids = [one for one in batch["document_ids"].unique().tolist() if one != PADDING_DOCUMENT]
            texts = [made.loaded_tokenizer.decode(batch["input_ids"][batch["document_ids"] == one]) for one in ids]
            names = [next(word for word in text.split() if word[0] == "w") for text in texts]
            assert len(set(names[:3])) == len(set(names[3:])) == 1
            assert names[0] != names[3]
            known[split] |= {f"class {name[1:]}" for name in names}
        assert known[split] <= set(made.classes_of(split))
    assert [len(made.classes_of(split)) for split in ("train", "val", "test")] == [4, 2, 2]
    assert len(set.union(*known.values())) == sum(map(len, known.values()))


def test_measured_episodes_are_the_same_for_every_seed(tmp_path: Path) -> None:
    def rows(made: EpisodeData, split: str) -> list[Any]:
        return [row for source in made._sources(split) for row, _ in source.rows()]

    one, other = data(tmp_path), data(tmp_path, seed=5)
    assert rows(one, "val") == rows(other, "val")
    assert rows(one, "train") != rows(other, "train")


def test_without_classes_for_validation_there_is_none(tmp_path: Path) -> None:
    made = data(tmp_path, class_split=(0.75, 0.0, 0.25))
    assert set(made.documents) == {"train", "test"}


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"class_split": (0.5, 0.2, 0.2)}, "give three shares that add up to 1"),
        ({"val": "x.jsonl"}, "measured episodes are of other classes"),
        ({"batches": Batches(mode="sorted", documents=2)}, r"set data\.batches\.documents to 1"),
        ({"reading": Reading(streaming=True)}, r"set data\.reading\.streaming to false"),
        ({"ways": 1}, r"data\.ways is 1"),
    ],
)
def test_what_makes_no_episodes_is_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        EpisodeData("rows.jsonl", **fields)._sources("train")
