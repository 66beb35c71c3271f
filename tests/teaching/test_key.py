from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny_networks import tiny_llama

from lightllm.models import EveryNthLayer, Pretrained
from lightllm.teaching.key import Lesson


@dataclass
class Store:
    digest: str

    def piece(self, document: int, start: int = 0, length: int | None = None) -> Any:
        raise AssertionError("the key does not read")


@dataclass
class Chosen:
    store: Store
    examples: np.ndarray
    lengths: np.ndarray


DOCUMENTS = Chosen(Store("content"), np.arange(4)[:, None], np.array([[3], [4], [5], [6]]))


@pytest.fixture
def network(tmp_path: Path) -> str:
    torch.manual_seed(0)
    tiny_llama().save_pretrained(tmp_path / "network")
    return str(tmp_path / "network")


def folder(lesson: Lesson, documents: Chosen, root: str | None) -> Path:
    return lesson.folders({"train": documents}, root)["train"]


def lesson(network: str, **fields: Any) -> Lesson:
    return Lesson(Pretrained(network), None, 8, 1.0, 320)._replace(**fields)


def test_what_answers_depend_on(network: str, tmp_path: Path) -> None:
    root = str(tmp_path / "root")
    base = folder(lesson(network), DOCUMENTS, root)
    assert base.parent == tmp_path / "root"
    assert folder(lesson(network), replace(DOCUMENTS), root) == base
    others = [
        lesson(network, teacher=Pretrained(network, dtype="bfloat16")),
        lesson(network, teacher=EveryNthLayer(network, 2)),
        lesson(network, bits=4),
        lesson(network, k=9),
        lesson(network, temperature=2.0),
        lesson(network, vocabulary=312),
    ]
    folders = [folder(other, DOCUMENTS, root) for other in others]
    folders += [
        folder(lesson(network), replace(DOCUMENTS, **change), root)
        for change in (
            {"store": Store("other content")},
            {"examples": np.arange(3)[:, None], "lengths": DOCUMENTS.lengths[:3]},
            {"lengths": np.minimum(DOCUMENTS.lengths, 5)},
        )
    ]
    assert len({base, *folders}) == len(folders) + 1


def test_the_teachers_weights_count_and_not_where_they_are(network: str, tmp_path: Path) -> None:
    first = folder(lesson(network), DOCUMENTS, None)
    moved = tmp_path / "moved"
    Path(network).rename(moved)
    assert folder(lesson(str(moved)), DOCUMENTS, None) == first
    weights = tiny_llama()
    weights.model.norm.weight.data += 1e-3
    weights.save_pretrained(moved)
    assert folder(lesson(str(moved)), DOCUMENTS, None) != first


def test_folders_are_in_the_cache(network: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LIGHTLLM_CACHE", str(tmp_path / "cache"))
    assert folder(lesson(network), DOCUMENTS, None).parent == tmp_path / "cache" / "teachers"
