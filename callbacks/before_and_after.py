"""BeforeAndAfter: what training changed, in numbers and in answers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.utilities.rank_zero import rank_zero_only
from rich.console import Console
from rich.table import Table
from typing_extensions import override

from lightllm.generate import Decoding, Message, generate
from lightllm.models.inference import inference
from lightllm.parallel.spreading import as_in_a_step, require_network

if TYPE_CHECKING:
    from lightllm.modules.base import LanguageModule


class BeforeAndAfter(Callback):
    """Measures the validation data and answers the prompts before the first step and after the last, and compares.

    The comparison is printed and written to `RUN/before_and_after.json`. Random numbers stay as they were.

    Args:
        prompts: Texts to continue, or chats (lists of `{role: …, content: …}`) to answer.
        decoding: How tokens are chosen: 64 greedily when None.
    """

    def __init__(self, prompts: list[str | list[Message]] | None = None, decoding: Decoding | None = None) -> None:
        self.prompts = prompts or []
        self.decoding = decoding or Decoding(max_new_tokens=64)
        self._before: dict[str, Any] | None = None

    @override
    def setup(self, trainer: Trainer, pl_module: LanguageModule, stage: str) -> None:  # type: ignore[override]
        if self.prompts:
            require_network(trainer.strategy, type(self).__name__, "has the network answer prompts")

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LanguageModule) -> None:  # type: ignore[override]
        if self._before is None:
            self._before = self._observe(trainer, pl_module)

    @override
    def on_train_end(self, trainer: Trainer, pl_module: LanguageModule) -> None:  # type: ignore[override]
        assert self._before is not None
        self._report(trainer, self._before, self._observe(trainer, pl_module))

    @override
    def state_dict(self) -> dict[str, Any]:
        return {"before": self._before}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._before = state_dict["before"]

    def _observe(self, trainer: Trainer, module: LanguageModule) -> dict[str, Any]:
        """The validation metrics and an answer to each prompt."""
        answers: list[str] = []
        with as_in_a_step(module):
            if self.prompts:
                assert module.tokenizer is not None, "prompts need a tokenizer"
                answers = generate(module.built_network, module.tokenizer, self.prompts, self.decoding)
            return {"metrics": _measured(trainer, module), "answers": answers}

    @rank_zero_only
    def _report(self, trainer: Trainer, before: dict[str, Any], after: dict[str, Any]) -> None:
        prompts = [one if isinstance(one, str) else one[-1]["content"] for one in self.prompts]
        path = Path(trainer.default_root_dir) / "before_and_after.json"
        path.write_text(json.dumps({"prompts": prompts, "before": before, "after": after}, indent=2) + "\n")
        console = Console()
        numbers = Table("validation", "before", "after", "change", title="What training changed")
        for name, value in before["metrics"].items():
            new = after["metrics"][name]
            numbers.add_row(name, f"{value:.3f}", f"{new:.3f}", f"{new - value:+.3f}")
        if before["metrics"]:
            console.print(numbers)
        for prompt, *answers in zip(prompts, before["answers"], after["answers"], strict=True):
            console.print(f"\n[bold]{_escaped(prompt)}[/]")
            for when, answer in zip(("before", "after "), answers, strict=True):
                console.print(f"  [cyan]{when}[/] {_escaped(answer.strip())}")


def _measured(trainer: Trainer, module: LanguageModule) -> dict[str, float]:
    """The metrics of the whole validation data, beside those that the module is counting; empty without such data."""
    loaders = trainer.fit_loop.epoch_loop.val_loop._data_source.dataloader()
    metrics = module.new_metrics().to(module.device)
    kept, module.metrics = module.metrics, metrics
    num_batches = 0
    with torch.random.fork_rng(), inference(module):
        for loader in loaders if isinstance(loaders, list) else [loaders]:
            for batch in loader:
                # By the strategy: in a pipeline, it takes all ranks to measure a batch.
                trainer.strategy.validation_step(trainer.strategy.batch_to_device(batch), num_batches)
                num_batches += 1
    module.metrics = kept
    return {name: float(value) for name, value in metrics.compute().items()} if num_batches else {}


def _escaped(text: str) -> str:
    """Text that rich prints as it is."""
    return text.replace("[", r"\[")
