from __future__ import annotations

import multiprocessing
import warnings
from pathlib import Path

import pytest
from taught import ask, chats, distillation, save_teacher

from lightllm.datamodules import Batches
from lightllm.modules import TeacherCache
from lightllm.teach import teach
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


def test_two_that_start_together_ask_once(teacher: str, tmp_path: Path) -> None:
    """They are forks of this process, which note whenever a teacher is asked."""
    cache = TeacherCache(k=8, folder=str(tmp_path / "answers"))
    chats(tmp_path).prepare_data()
    context = multiprocessing.get_context("fork")
    both, results = context.Barrier(2), context.Queue()
    plain = write.Asking.write

    def one() -> None:
        asked = []

        def noting(self: write.Asking, documents: object, folder: Path) -> None:
            asked.append(folder.name)
            plain(self, documents, folder)  # type: ignore[arg-type]

        write.Asking.write = noting  # type: ignore[assignment,method-assign]
        module, data = distillation(teacher, cache), chats(tmp_path)
        both.wait()
        taught = teach(module, data)
        results.put((len(asked), str(taught["train"].store.folder), taught["train"].store.num_targets))

    processes = [context.Process(target=one) for _ in range(2)]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # Python 3.12 warns of forks beside threads
        for process in processes:
            process.start()
    found = [results.get(timeout=120) for _ in processes]
    for process in processes:
        process.join()
    assert sum(asked for asked, *_ in found) == 2, "once for each split"
    assert found[0][1:] == found[1][1:]


def test_a_teacher_that_is_not_cached(teacher: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="the teacher is not cached"):
        teach(distillation(teacher, None), chats(tmp_path))
