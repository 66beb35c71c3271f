"""KeepTokenizer: a run folder carries its tokenizer, so that every later command needs nothing else."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from lightning.pytorch import Callback, Trainer
from typing_extensions import override

if TYPE_CHECKING:
    from lightllm.modules.base import LanguageModule


class KeepTokenizer(Callback):
    """Saves the tokenizer to `RUN/tokenizer` before training starts; `fast_dev_run` leaves nothing behind."""

    @override
    def on_fit_start(self, trainer: Trainer, pl_module: LanguageModule) -> None:  # type: ignore[override]
        trial = trainer.fast_dev_run  # type: ignore[attr-defined]  # it is set from outside of the class
        if trainer.is_global_zero and pl_module.tokenizer is not None and not trial:
            pl_module.tokenizer.save_pretrained(Path(trainer.default_root_dir) / "tokenizer")
