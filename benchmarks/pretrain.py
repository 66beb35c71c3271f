"""Pretraining a 10M llama from scratch, beside a hand-written PyTorch loop over the same network with torch.compile.

    python benchmarks/pretrain.py TEXT_FILE [--steps 40]

Both sides train the same network (`llama-10m`, bfloat16 weights, AdamW fused) on rows of 512 tokens, 8 a step, packed
by lightllm's data engine; both compile. Each runs in a process of its own, and the steps that compile are left out.
The share of matrix products is measured on the products alone: the same shapes, forward and backward, in a loop.
The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from typing import Any

ROWS, LENGTH, VOCABULARY, WARM_UP_STEPS = 8, 512, 8192, 5


def data(file: str) -> Any:
    """The rows, the same for both sides."""
    from lightllm.datamodules import Batches, TextData, TrainTokenizer

    return TextData(
        file,
        tokenizer=TrainTokenizer(vocab_size=VOCABULARY),
        max_length=LENGTH,
        batches=Batches("packed", tokens=ROWS * LENGTH),
    )


def ours(file: str, steps: int) -> dict[str, float]:
    """Tokens per second of CausalPretraining under the Trainer."""
    import torch
    from lightning.pytorch import Callback, Trainer

    from lightllm.models import FromConfig
    from lightllm.modules import CausalPretraining, Schedule

    class Clock(Callback):
        def on_train_batch_end(self, trainer: Trainer, *_: object) -> None:
            if trainer.global_step == WARM_UP_STEPS:
                self.began = time.perf_counter()
            if trainer.global_step == steps:
                self.ended = time.perf_counter()

    torch.manual_seed(0)
    clock = Clock()
    module = CausalPretraining(
        FromConfig("llama-10m", dtype="bfloat16"),
        optimizer=lambda parameters: torch.optim.AdamW(parameters, lr=1e-3, fused=True),
        schedule=Schedule("constant"),
        compile=True,
    )
    trainer = Trainer(
        max_steps=steps,
        max_epochs=-1,
        accelerator="cpu",
        logger=False,
        limit_val_batches=0,
        enable_checkpointing=False,
        enable_model_summary=False,
        enable_progress_bar=False,
        callbacks=[clock],
    )
    trainer.fit(module, datamodule=data(file))
    seconds = clock.ended - clock.began
    loss = float(trainer.logged_metrics["train/loss"])
    return {"tokens_per_s": (steps - WARM_UP_STEPS) * ROWS * LENGTH / seconds, "seconds": seconds, "loss": loss}


def by_hand(file: str, steps: int) -> dict[str, float]:
    """Tokens per second of the loop that one would write: full logits, `F.cross_entropy`, `torch.compile`."""
    import torch
    from torch.nn.functional import cross_entropy

    from lightllm.models import BuildRequest, FromConfig

    torch.manual_seed(0)
    text = data(file)
    text.prepare_data()
    text.setup("fit")
    network = FromConfig("llama-10m", dtype="bfloat16", attention="sdpa").build(BuildRequest("causal", text.tokenizer))
    network.train()
    network.config.use_cache = False  # type: ignore[union-attr]
    network.compile()
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-3, fused=True)
    done, began = 0, 0.0
    while done < steps:
        for batch in text.train_dataloader():
            logits = network(input_ids=batch["input_ids"], position_ids=batch["position_ids"]).logits
            loss = cross_entropy(logits.flatten(0, 1).float(), batch["labels"].flatten())
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            done += 1
            if done == WARM_UP_STEPS:
                began = time.perf_counter()
            if done == steps:
                break
    seconds = time.perf_counter() - began
    return {"tokens_per_s": (steps - WARM_UP_STEPS) * ROWS * LENGTH / seconds, "seconds": seconds, "loss": loss.item()}


def products(_: str, steps: int) -> dict[str, float]:
    """Seconds a step that its matrix products take alone: of every linear layer and the head, forward and backward."""
    import torch

    from lightllm.models import FromConfig

    fields = FromConfig("llama-10m").fields
    width, inner, blocks = fields["hidden_size"], fields["intermediate_size"], fields["num_hidden_layers"]
    shapes = [(width, width)] * 4 + [(width, inner)] * 2 + [(inner, width)]
    layers = [torch.randn(out, into).bfloat16() for into, out in shapes * blocks + [(width, VOCABULARY)]]
    inputs = {into: torch.randn(ROWS * LENGTH, into).bfloat16() for into in (width, inner)}
    gradients = {out: torch.randn(ROWS * LENGTH, out).bfloat16() for out in (width, inner, VOCABULARY)}

    def step() -> None:
        for weight in layers:
            out, into = weight.shape
            inputs[into] @ weight.T
            gradients[out] @ weight
            gradients[out].T @ inputs[into]

    step()
    began = time.perf_counter()
    for _index in range(min(steps, 10)):
        step()
    return {"seconds_per_step": (time.perf_counter() - began) / min(steps, 10)}


SIDES = {"ours": ours, "by_hand": by_hand, "products": products}


def main() -> None:
    """Run every side in its own process and print the ratios."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("file")
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--side", choices=list(SIDES), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.side:
        print(json.dumps(SIDES[options.side](options.file, options.steps)))
        return
    results = {}
    for side in SIDES:
        command = [sys.executable, __file__, options.file, "--steps", str(options.steps), "--side", side]
        output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
        results[side] = json.loads(output.splitlines()[-1])
        print(side, json.dumps(results[side]), flush=True)
    seconds_per_step = results["ours"]["seconds"] / (options.steps - WARM_UP_STEPS)
    ratios = {
        "tokens_per_s_ratio": results["ours"]["tokens_per_s"] / results["by_hand"]["tokens_per_s"],
        "matmul_share": results["products"]["seconds_per_step"] / seconds_per_step,
    }
    print(json.dumps({name: round(value, 4) for name, value in ratios.items()}))


if __name__ == "__main__":
    main()
