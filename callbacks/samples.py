"""SampleGenerations: what the network says to the same prompts as it learns."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

from lightning.pytorch import Callback, Trainer
from lightning.pytorch.loggers import Logger, TensorBoardLogger, WandbLogger
from lightning.pytorch.trainer.states import TrainerFn
from typing_extensions import override

from lightllm.generate import Decoding, Message, generate
from lightllm.parallel.spreading import as_in_a_step, require_network

if TYPE_CHECKING:
    from lightllm.modules.base import LanguageModule

COLUMNS = ["step", "prompt", "completion"]


class SampleGenerations(Callback):
    """Continues fixed prompts after every validation: to `RUN/samples.jsonl`, one line a prompt, and to the loggers.

    W&B gets a table, TensorBoard a text. Training goes on as if nothing had happened: random numbers, modes and
    gradients stay as they were. Every rank generates, because the network may be sharded over them, and the main one
    writes.

    Args:
        prompts: Texts to continue, or chats (lists of `{role: …, content: …}`) to answer.
        decoding: How to choose tokens: 64 greedily when None. The seed is the same every time.
    """

    def __init__(self, prompts: list[str | list[Message]], decoding: Decoding | None = None) -> None:
        if not prompts:
            raise ValueError("prompts is empty: give at least one text, or leave SampleGenerations out")
        self.prompts = prompts
        self.decoding = decoding or Decoding(max_new_tokens=64)

    @override
    def setup(self, trainer: Trainer, pl_module: LanguageModule, stage: str) -> None:  # type: ignore[override]
        require_network(trainer.strategy, type(self).__name__, "has the network write")

    @override
    def on_validation_end(self, trainer: Trainer, pl_module: LanguageModule) -> None:  # type: ignore[override]
        if trainer.sanity_checking or trainer.state.fn != TrainerFn.FITTING:
            return
        if pl_module.tokenizer is None:
            raise ValueError("SampleGenerations needs a tokenizer, and neither the data nor the network has one")
        with as_in_a_step(pl_module):
            completions = generate(pl_module.built_network, pl_module.tokenizer, self.prompts, self.decoding)
        if not trainer.is_global_zero:
            return
        shown = [_text(prompt) for prompt in self.prompts]
        rows = [(trainer.global_step, *pair) for pair in zip(shown, completions, strict=True)]
        _append(Path(trainer.default_root_dir) / "samples.jsonl", rows)
        for logger in trainer.loggers:
            _log_table(logger, rows, trainer.global_step)


def _text(prompt: str | list[Message]) -> str:
    """Return a prompt as a cell of a table."""
    return prompt if isinstance(prompt, str) else json.dumps(prompt, ensure_ascii=False)


def _append(path: Path, rows: list[tuple[int, str, str]]) -> None:
    """Add rows to the file, without those of this step and later ones that a killed run left there."""
    kept = [line for line in _sound_lines(path) if json.loads(line)["step"] < rows[0][0]]
    new = [json.dumps(dict(zip(COLUMNS, row, strict=True)), ensure_ascii=False) for row in rows]
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".jsonl.tmp")
    temporary.write_text("\n".join([*kept, *new]) + "\n", encoding="utf-8")
    temporary.replace(path)


def _sound_lines(path: Path) -> list[str]:
    """Read the file's lines without what a crash left behind the last line end."""
    text = path.read_text(encoding="utf-8", errors="replace") if path.exists() else ""
    return text[: text.rfind("\n") + 1].split("\n")[:-1]


def _log_table(logger: Logger, rows: list[tuple[int, str, str]], step: int) -> None:
    if isinstance(logger, WandbLogger):
        logger.log_table("samples", columns=COLUMNS, data=[list(row) for row in rows], step=step)
    elif isinstance(logger, TensorBoardLogger):
        # Markdown, indented by four spaces: as it is, whatever signs the text has.
        blocks = [
            f"    {line}" for _, prompt, text in rows for line in [*prompt.split("\n"), "--", *text.split("\n"), ""]
        ]
        logger.experiment.add_text("samples", "\n".join(blocks), global_step=step)
