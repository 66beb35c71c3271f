"""The run folder: what `fit` writes, and what every later command reads."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import suppress
from itertools import count
from pathlib import Path
from typing import Any

import yaml


class RunFolder:
    """One run on disk.

        config.yaml         the whole resolved configuration
        metrics.csv         one row a logged step
        samples.jsonl       generations during validation
        predictions.jsonl   what `lightllm predict` found
        ledger.jsonl        what each step of compression cost, a row a step
        tokenizer/          the data's tokenizer
        checkpoints/        step=….ckpt, best.ckpt, last.ckpt
        export/             the last export, a Hugging Face folder

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
    def metrics(self) -> Path:
        """The table of metrics."""
        return self.path / "metrics.csv"

    @property
    def predictions(self) -> Path:
        """What `predict` writes."""
        return self.path / "predictions.jsonl"

    @property
    def ledger(self) -> Path:
        """The rows of the compression ledger."""
        return self.path / "ledger.jsonl"

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
    def whole_exports(self) -> list[Path]:
        """The whole models that lie in the folder, by name: Hugging Face folders and GGUF files."""
        folders = {file.parent for name in ("*.safetensors", "*.bin") for file in self.path.glob(f"*/{name}")}
        return sorted(
            [*(one for one in folders if (one / "config.json").is_file()), *self.path.glob("*.gguf")],
            key=lambda path: path.name,
        )

    @property
    def exists(self) -> bool:
        """Whether a run was begun here."""
        return self.config.is_file()

    def begin(self, config: str) -> bool:
        """Make the folder a run's with this configuration, at once and whole; False if it is a run's already."""
        temporary = self._temporary(config)
        try:
            os.link(temporary, self.config)
        except FileExistsError:
            return False
        except OSError:  # there are no hard links here
            if self.config.exists():
                return False
            temporary.replace(self.config)
        finally:
            temporary.unlink(missing_ok=True)
        return True

    def write_config(self, config: str) -> None:
        """Replace the configuration; at any moment there is a whole one."""
        self._temporary(config).replace(self.config)

    def _temporary(self, config: str) -> Path:
        self.path.mkdir(parents=True, exist_ok=True)
        file = self.path / f".config.yaml.tmp-{os.getpid()}"
        file.write_text(config, encoding="utf-8")
        return file

    def release(self) -> None:
        """Make the folder no run's, unless something was trained: what was refused at the start leaves no trace."""
        if self.metrics.exists() or self.checkpoints.exists():
            return
        self.config.unlink(missing_ok=True)
        self.ledger.unlink(missing_ok=True)
        with suppress(OSError):  # there is something else in it, which stays
            self.path.rmdir()

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
        return best if best.exists() else self.newest_checkpoint()

    def checkpoint(self, which: str) -> Path:
        """A checkpoint by name: `best`, `newest`, or a file.

        Raises:
            ValueError: There is none.
        """
        if which in ("best", "newest"):
            return self.best_checkpoint() if which == "best" else self.newest_checkpoint()
        if not Path(which).exists():
            raise ValueError(f"no checkpoint {which!r}: give best, newest or a file in {str(self.checkpoints)!r}")
        return Path(which)

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


def numbered(wanted: str) -> Iterator[RunFolder]:
    """Folders to try for a new run: `wanted`, `wanted-2`, `wanted-3`, …."""
    yield RunFolder(wanted)
    yield from (RunFolder(f"{wanted}-{number}") for number in count(2))
