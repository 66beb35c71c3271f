from pathlib import Path

import pytest
from tiny_networks import tiny_llama
from transformers import LlamaForCausalLM
from transformers.utils import logging

from lightllm.models.progress import no_progress_bars


def test_reading_and_writing_is_silent_and_bars_come_back(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    shown = logging.is_progress_bar_enabled()
    with no_progress_bars():
        tiny_llama().save_pretrained(tmp_path)
        LlamaForCausalLM.from_pretrained(tmp_path)
    assert "%" not in capfd.readouterr().err
    assert logging.is_progress_bar_enabled() == shown
