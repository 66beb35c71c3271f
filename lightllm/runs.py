"""The run folder: what `fit` writes, and what every later command reads."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import yaml

CHOSEN_RUN = "LIGHTLLM_RUN"
"""Environment variable by which the ranks that a run starts learn which folder the first one chose."""


class RunFolder:
    """One run on disk.

        config.yaml     the whole resolved configuration
        metrics.csv     one row a logged step
        samples.jsonl   generations during validation
        tokenizer/      the data's tokenizer
        checkpoints/    step=….ckpt, best.ckpt, last.ckpt
        export/         the last export, a Hugging Face folder

    Args:
        path: The folder; it need not exist yet.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)

    @property
    def config(self) -> Path:
        """The resolved configuration."""
        return self.path / "config.yaml"

    @property
    def tokenizer(self) -> Path:
        """The folder of the data's tokenizer."""
        return self.path / "tokenizer"

    @property
    def checkpoints(self) -> Path:
        """The folder of checkpoints."""
        return self.path / "checkpoints"

    @property
    def export(self) -> Path:
        """The folder of the last export."""
        return self.path / "export"

    @property
    def exists(self) -> bool:
        """Whether a run was begun here."""
        return self.config.is_file()

    def require(self) -> RunFolder:
        """Itself.

        Raises:
            ValueError: No run was begun here.
        """
        if not self.exists:
            raise ValueError(f"{str(self.path)!r} is not a run folder: it has no config.yaml")
        return self

    def read_config(self) -> dict[str, Any]:
        """The resolved configuration as plain values."""
        config = yaml.safe_load(self.require().config.read_text())
        assert isinstance(config, dict)
        return config

    def best_checkpoint(self) -> Path:
        """The checkpoint with the lowest validation loss; without validation, the newest.

        Raises:
            ValueError: There is none yet.
        """
        best = self.checkpoints / "best.ckpt"
        return best if best.is_file() else self.newest_checkpoint()

    def newest_checkpoint(self) -> Path:
        """The newest complete checkpoint.

        Raises:
            ValueError: There is none yet.
        """
        from lightllm.checkpoint_io import newest_checkpoint

        found = newest_checkpoint(self.checkpoints)
        if found is None:
            raise ValueError(f"{str(self.checkpoints)!r} has no complete checkpoint")
        return found


def choose_run(wanted: str) -> RunFolder:
    """The folder of a new run: `wanted`, or `wanted-2`, `wanted-3`, … where a run was begun there before.

    The choice is kept in the environment, so that further ranks, which start later, use the same folder.
    """
    if CHOSEN_RUN in os.environ:
        return RunFolder(os.environ[CHOSEN_RUN])
    run, number = RunFolder(wanted), 1
    while run.exists:
        number += 1
        run = RunFolder(f"{wanted}-{number}")
    os.environ[CHOSEN_RUN] = str(run.path)
    return run
