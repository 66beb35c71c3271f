"""KeepTokenizer: a run folder carries its tokenizer, so that every later command needs nothing else."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from lightning.pytorch import Callback, Trainer
from typing_extensions import override

if TYPE_CHECKING:
    from lightllm.modules.base import LanguageModule


class KeepTokenizer(Callback):
    """Saves the tokenizer to `RUN/tokenizer` before training starts."""

    @override
    def on_fit_start(self, trainer: Trainer, pl_module: LanguageModule) -> None:  # type: ignore[override]
        if trainer.is_global_zero and pl_module.tokenizer is not None:
            pl_module.tokenizer.save_pretrained(Path(trainer.default_root_dir) / "tokenizer")
