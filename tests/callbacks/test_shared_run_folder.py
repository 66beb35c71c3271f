from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from tiny_run import TinyModule, tiny_trainer

from lightllm.callbacks import SharedRunFolder


def test_the_folder_of_the_first_rank_is_everyones(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = tiny_trainer(tmp_path / "mine", [])

    def broadcast(value: Any) -> str:
        assert value == str(tmp_path / "mine")
        return str(tmp_path / "the-first-ranks")

    monkeypatch.setattr(trainer.strategy, "broadcast", broadcast)
    SharedRunFolder().setup(trainer, TinyModule(), "fit")
    assert trainer.default_root_dir == str(tmp_path / "the-first-ranks")


def test_a_single_rank_keeps_its_own(tmp_path: Path) -> None:
    trainer = tiny_trainer(tmp_path, [])
    SharedRunFolder().setup(trainer, TinyModule(), "fit")
    assert trainer.default_root_dir == str(tmp_path)
