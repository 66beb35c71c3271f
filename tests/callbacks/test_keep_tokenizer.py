from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

from tiny_networks import tiny_tokenizer
from transformers import AutoTokenizer

from lightllm.callbacks import KeepTokenizer


def fit_begins(folder: Path, tokenizer: Any, first_rank: bool = True) -> None:
    trainer: Any = SimpleNamespace(is_global_zero=first_rank, default_root_dir=str(folder))
    KeepTokenizer().on_fit_start(trainer, SimpleNamespace(tokenizer=tokenizer))  # type: ignore[arg-type]


def test_the_tokenizer_of_the_data_is_kept_with_its_template(tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = "{{ messages }}"
    fit_begins(tmp_path, tokenizer)
    kept = AutoTokenizer.from_pretrained(tmp_path / "tokenizer")
    assert kept("naïve whale").input_ids == tokenizer("naïve whale").input_ids
    assert kept.chat_template == "{{ messages }}"


def test_nothing_is_written_without_a_tokenizer_or_by_another_rank(tmp_path: Path) -> None:
    fit_begins(tmp_path, None)
    fit_begins(tmp_path, tiny_tokenizer(), first_rank=False)
    assert list(tmp_path.iterdir()) == []
