from __future__ import annotations

import threading
from pathlib import Path

import pytest
from taught import ask, chats, distillation, save_teacher

from lightllm.datamodules import Batches
from lightllm.modules import TeacherCache
from lightllm.teach import Taught, teach
from lightllm.teaching import write


@pytest.fixture
def teacher(tmp_path: Path) -> str:
    return save_teacher(tmp_path / "teacher")


def test_every_split_is_kept_once(teacher: str, tmp_path: Path) -> None:
    cache = TeacherCache(k=8, folder=str(tmp_path / "answers"))
    first = ask(teacher, chats(tmp_path), cache)
    assert {split: taught.new for split, taught in first.items()} == {"train": True, "val": True}
    again = ask(teacher, chats(tmp_path, Batches("sorted", tokens=256), seed=5), cache)
    assert {split: taught.new for split, taught in again.items()} == {"train": False, "val": False}
    assert [taught.store.folder for taught in again.values()] == [taught.store.folder for taught in first.values()]
    data = chats(tmp_path)
    data.prepare_data()
    data.setup("fit")
    for split, taught in first.items():
        batches = data.excerpt(split)
        assert taught.store.num_targets == sum(int((batch["labels"] >= 0).sum()) for batch in batches)


def test_two_that_start_together_ask_once(teacher: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache, asked = TeacherCache(k=8, folder=str(tmp_path / "answers")), []
    both = threading.Barrier(2)
    plain = write.Asking.write

    def noting(self: write.Asking, documents: object, folder: Path) -> None:
        asked.append(folder.name)
        plain(self, documents, folder)  # type: ignore[arg-type]

    monkeypatch.setattr(write.Asking, "write", noting)
    chats(tmp_path).prepare_data()
    found: list[dict[str, Taught]] = []

    def one() -> None:
        module, data = distillation(teacher, cache), chats(tmp_path)
        both.wait()
        found.append(teach(module, data))

    threads = [threading.Thread(target=one) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 2
    assert len(asked) == 2, "one for each split"
    assert len({taught["train"].store.folder for taught in found}) == 1
    assert sorted(file.name for file in (tmp_path / "answers").iterdir() if file.is_dir())


def test_a_teacher_that_is_not_cached(teacher: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="the teacher is not cached"):
        teach(distillation(teacher, None), chats(tmp_path))
