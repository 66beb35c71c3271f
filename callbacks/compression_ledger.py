"""CompressionLedger: what every step of compressing a network saves, and what it costs."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

from lightning.pytorch import Callback, Trainer
from lightning.pytorch.strategies import DeepSpeedStrategy, FSDPStrategy, ModelParallelStrategy
from lightning.pytorch.utilities import rank_zero_info
from torch import nn
from typing_extensions import override

from lightllm.batch import TextBatch
from lightllm.compression.ledger import Ledger
from lightllm.models.inference import own_random_numbers
from lightllm.runs import RunFolder

if TYPE_CHECKING:
    from lightllm.measure import GenerationTest
    from lightllm.modules.base import LanguageModule


class CompressionLedger(Callback):
    """Measures the network as it comes, after each step of compression and at the end, to `RUN/ledger.jsonl`.

    A row is taken when a step is announced: by the build pipeline (`dense`, structure, low rank; a teacher, too), by a
    callback when its schedule is over, and when training ends. So it does not matter where this callback stands among
    the others, and training goes on as if nothing had been measured. `lightllm compress-report RUN` adds the exported
    files to the table and draws it.

    Args:
        limit: Validation documents for the loss at most, evenly spaced; all when None.
        generation: Measure tokens per second and peak memory too, of the network as an export would hold it: written to
            the run folder for a moment, and loaded in a process of its own.
        new_tokens: Tokens that are generated for it, each time.

    Raises:
        ValueError: A number is less than 1.
    """

    def __init__(self, limit: int | None = 64, generation: bool = True, new_tokens: int = 64) -> None:
        if limit is not None and limit < 1:
            raise ValueError(f"limit is {limit}: give at least one document, or null for all")
        if new_tokens < 1:
            raise ValueError(f"new_tokens is {new_tokens}: give at least one, or set generation to false")
        self.limit = limit
        self.generation = generation
        self.new_tokens = new_tokens
        self._batches: list[TextBatch] = []
        self._test: GenerationTest | None = None
        self._taken: set[tuple[str, int | None]] = set()

    @override
    def setup(self, trainer: Trainer, pl_module: LanguageModule, stage: str) -> None:  # type: ignore[override]
        if stage != "fit":
            return
        if isinstance(trainer.strategy, (ModelParallelStrategy, FSDPStrategy, DeepSpeedStrategy)):
            raise ValueError(
                f"CompressionLedger needs the whole network on one rank, and {type(trainer.strategy).__name__} shards "
                "it: leave it out and run lightllm compress-report when training is over"
            )
        from lightllm.ledger_rows import generation_test  # with peft, a second, that `lightllm fit --help` does without

        excerpt = getattr(getattr(trainer, "datamodule", None), "excerpt", None)
        if excerpt is None:
            raise ValueError(
                "CompressionLedger measures the loss on documents of a datamodule of lightllm's (TextData, ChatData, "
                "…), and there is none"
            )
        self._batches = excerpt("val", self.limit)
        is_trial = bool(trainer.fast_dev_run)  # type: ignore[attr-defined]
        prompts = self._batches or excerpt("train", 1)
        self._test = generation_test(prompts, self.new_tokens) if self.generation and not is_trial else None
        self._taken = set()
        pl_module.announcements.listen(partial(self._measure, trainer))

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LanguageModule) -> None:  # type: ignore[override]
        if not trainer.is_global_zero:
            return
        if trainer.ckpt_path is None:
            self._ledger(trainer).keep(self._taken)
        else:
            self._ledger(trainer).rewind(trainer.global_step)

    def _measure(self, trainer: Trainer, step: str, network: nn.Module) -> None:
        """Take the row of a step that has just been done."""
        if trainer.is_global_zero:
            from lightllm.ledger_rows import Generation, row_of_network

            ledger, at = self._ledger(trainer), trainer.global_step
            # A run that is resumed builds its network again: what is measured in seconds is, and compared.
            earlier = [row for row in ledger.rows if row.key == (step, at)]
            generation = None if self._test is None else Generation(self._test, ledger.path.parent, earlier)
            with own_random_numbers(trainer.strategy.root_device, 0), trainer.precision_plugin.val_step_context():
                row = row_of_network(step, at, network, self._batches, generation)
            ledger.add(row)
            self._taken.add(row.key)
            loss = "" if row.loss is None else f", loss {row.loss:.4f}"
            rank_zero_info(f"ledger: {step}{loss}, {row.weight_bytes / 1e6:.4g} MB")
        trainer.strategy.barrier()

    def _ledger(self, trainer: Trainer) -> Ledger:
        return Ledger(RunFolder(trainer.default_root_dir).ledger)
