"""What a fixed mask costs at every step: under full training and under LoRA, each over the same step without.

    python benchmarks/masks.py [--layers 4] [--tokens 1024] [--steps 5] [--rounds 3] [--cpu-time]

Layers as wide as those of SmolLM2-135M, with random weights, half of which `MagnitudePruning` prunes before the first
step. Both sides run under the Trainer in one process, in turns; medians of the steps are compared. Under full training
the mask is held in the weights and costs two passes over them; under LoRA the merged weight is masked, and with it
comes the gradient of the whole weight, which LoRA alone does without. The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from typing import Any

import torch
from lightning.pytorch import Callback, Trainer
from torch.utils.data import DataLoader

from lightllm.batch import TextBatch
from lightllm.callbacks import MagnitudePruning
from lightllm.models import Adapter, FromConfig, LoRA
from lightllm.modules import CausalPretraining, Schedule

VOCABULARY, LENGTH = 2048, 256
SMOLLM2 = {"hidden_size": 576, "intermediate_size": 1536, "num_attention_heads": 9, "num_key_value_heads": 3}


def batch(seed: int, tokens: int) -> TextBatch:
    """One batch of random tokens, `[tokens / LENGTH, LENGTH]`."""
    generator = torch.Generator().manual_seed(seed)
    rows = tokens // LENGTH
    drawn = torch.randint(VOCABULARY, (rows, LENGTH + 1), generator=generator)
    return TextBatch(
        input_ids=drawn[:, :-1].contiguous(),
        labels=drawn[:, 1:].contiguous(),
        position_ids=torch.arange(LENGTH).expand(rows, LENGTH).contiguous(),
        document_ids=torch.arange(rows)[:, None].expand(rows, LENGTH).contiguous(),
    )


class StepClock(Callback):
    """Seconds from the start of one batch to the start of the next: everything that a step costs."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self.clock = clock
        self.marks: list[float] = []

    def on_train_batch_start(self, *_: Any) -> None:
        """Mark the time."""
        self.marks.append(self.clock())

    @property
    def seconds(self) -> list[float]:
        """Of each step but the last."""
        return [later - earlier for earlier, later in zip(self.marks, self.marks[1:], strict=False)]


def steps(options: argparse.Namespace, adapter: Adapter | None, masked: bool) -> list[float]:
    """Seconds of each step but the first two."""
    torch.manual_seed(0)
    fields = {**SMOLLM2, "num_hidden_layers": options.layers, "vocab_size": VOCABULARY}
    module = CausalPretraining(
        FromConfig("llama", fields, options.dtype),
        adapter=adapter,
        optimizer=lambda parameters: torch.optim.AdamW(parameters, lr=1e-4, fused=True),
        schedule=Schedule("constant"),
    )
    clock = StepClock(time.process_time if options.cpu_time else time.perf_counter)
    with tempfile.TemporaryDirectory() as folder:
        trainer = Trainer(
            max_epochs=1,
            accelerator="cpu",
            default_root_dir=folder,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            callbacks=[MagnitudePruning(0.5), clock] if masked else [clock],
        )
        batches = [batch(seed, options.tokens) for seed in range(options.steps + 3)]
        trainer.fit(module, DataLoader(batches, batch_size=None))  # type: ignore[arg-type]
    return clock.seconds[2:]


def main() -> None:
    """Run all sides in turns and print what a mask adds."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=1024)
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--cpu-time", action="store_true", help="of all threads, where others use the machine too")
    options = parser.parse_args()
    adapters: dict[str, Adapter | None] = {"full": None, "lora": LoRA(rank=16)}
    seconds: dict[tuple[str, bool], list[float]] = {(name, masked): [] for name in adapters for masked in (False, True)}
    for _ in range(options.rounds):
        for (name, masked), found in seconds.items():
            found += steps(options, adapters[name], masked)
    medians = {key: statistics.median(found) for key, found in seconds.items()}
    for (name, masked), value in medians.items():
        print(f"{name}, {'masked' if masked else 'dense'}: {1000 * value:.0f} ms a step")
    print(json.dumps({f"{name}_ratio": round(medians[name, True] / medians[name, False], 3) for name in adapters}))


if __name__ == "__main__":
    main()
