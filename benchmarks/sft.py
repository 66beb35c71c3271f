"""LoRA fine-tuning of SmolLM2-135M on chats, beside TRL's SFTTrainer: the same rows, rank, steps and learning rate.

    python benchmarks/sft.py --train chats-train.jsonl --val chats-val.jsonl [--peer-python PYTHON_WITH_TRL]

Each side runs in a process of its own, TRL's by `--peer-python`. 128 rows in 16 optimizer steps of 8, rank 16 on all
linear layers, loss on answers only, bfloat16 weights; then the loss on the first 64 validation rows. Training time is
from the first step to the last; memory is the process's peak. The last line is JSON: our figures over TRL's, and the
share of our time that the step's matrix products take alone on this machine, the same shapes in a loop: what no toolkit
can save.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROWS, VALIDATION_ROWS, ROWS_PER_STEP, RANK, LEARNING_RATE, MAX_LENGTH = 128, 64, 8, 16, 1e-3, 512


def first_rows(file: Path, count: int, folder: Path) -> str:
    """A copy of the first rows of a JSON lines file, so that both sides read the same."""
    copy = folder / file.name
    copy.write_text("".join(line + "\n" for line in file.read_text().splitlines()[:count]))
    return str(copy)


def chats(train: str, val: str) -> Any:
    """The rows as lightllm batches them: a step's eight in one packed row."""
    from lightllm.datamodules import Batches, ChatData

    return ChatData(train, val, max_length=MAX_LENGTH, batches=Batches("packed", documents=ROWS_PER_STEP))


def ours(train: str, val: str) -> dict[str, float]:
    """One run of lightllm, from Python."""
    import torch
    from lightning.pytorch import Callback, Trainer

    from lightllm.models import LoRA, Pretrained
    from lightllm.modules import FineTuning, Schedule

    class Clock(Callback):
        began = 0.0
        ended = 0.0

        def on_train_start(self, *_: object) -> None:
            self.began = time.perf_counter()

        def on_train_end(self, *_: object) -> None:
            self.ended = time.perf_counter()

    torch.manual_seed(0)
    clock = Clock()
    data = chats(train, val)
    module = FineTuning(
        Pretrained("smollm2-135m-instruct", dtype="bfloat16"),
        LoRA(rank=RANK, alpha=2 * RANK),
        optimizer=lambda parameters: torch.optim.AdamW(parameters, lr=LEARNING_RATE, weight_decay=0.0, fused=True),
        schedule=Schedule("constant"),
    )
    trainer = Trainer(
        max_epochs=1,
        accelerator="cpu",
        gradient_clip_val=1.0,
        num_sanity_val_steps=0,
        limit_val_batches=0,
        log_every_n_steps=1,
        logger=False,
        enable_checkpointing=False,
        enable_model_summary=False,
        enable_progress_bar=False,
        callbacks=[clock],
    )
    trainer.fit(module, datamodule=data)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    trainer.limit_val_batches = 1.0
    loss = trainer.validate(module, datamodule=data, verbose=False)[0]["val/loss"]
    return {
        "seconds": clock.ended - clock.began,
        "steps": trainer.global_step,
        "peak_mib": peak / 1024,
        "val_loss": loss,
    }


def products(train: str, val: str) -> dict[str, float]:
    """Seconds that the steps' matrix products take alone, forward and backward, beside frozen weights."""
    import torch
    from transformers import AutoConfig

    from lightllm.batch import IGNORE_INDEX
    from lightllm.models import load_tokenizer, resolve_checkpoint

    checkpoint = resolve_checkpoint("smollm2-135m-instruct")
    data = chats(train, val)
    data.tokenizer = load_tokenizer(checkpoint)
    data.prepare_data()
    data.setup("fit")
    config = AutoConfig.from_pretrained(checkpoint)
    width, inner = config.hidden_size, config.intermediate_size
    narrow = width * config.num_key_value_heads // config.num_attention_heads
    attention, inner_layers = [(width, width), (narrow, width), (narrow, width), (width, width)], [(inner, width)] * 2
    shapes = [*attention, *inner_layers, (width, inner)]
    block = [torch.randn(out, into).bfloat16() for out, into in shapes]
    head = torch.randn(config.vocab_size, width).bfloat16()

    def pair(weight: torch.Tensor, positions: int) -> None:
        inputs = torch.ones(positions, weight.shape[1], dtype=torch.bfloat16)
        (inputs @ weight.T) @ weight  # the layer, and its inputs' gradient

    seconds = 0.0
    for batch in data.train_dataloader():
        began = time.perf_counter()
        for weight in block * config.num_hidden_layers:
            pair(weight, batch["input_ids"].numel())
        pair(head, int((batch["labels"] != IGNORE_INDEX).sum()))
        seconds += time.perf_counter() - began
    return {"seconds": seconds}


def trl(train: str, val: str, checkpoint: str) -> dict[str, float]:
    """One run of TRL's SFTTrainer."""
    import torch
    from datasets import load_dataset
    from peft import LoraConfig
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from trl import SFTConfig, SFTTrainer

    rows = load_dataset("json", data_files={"train": train, "val": val})
    rows = rows.map(
        lambda row: {"prompt": row["messages"][:-1], "completion": row["messages"][-1:]}, remove_columns=["messages"]
    )
    trainer = SFTTrainer(
        model=AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.bfloat16),
        processing_class=AutoTokenizer.from_pretrained(checkpoint),
        train_dataset=rows["train"],
        eval_dataset=rows["val"],
        peft_config=LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules="all-linear", task_type="CAUSAL_LM"),
        args=SFTConfig(
            output_dir=tempfile.mkdtemp(),
            per_device_train_batch_size=ROWS_PER_STEP,
            per_device_eval_batch_size=ROWS_PER_STEP,
            num_train_epochs=1,
            learning_rate=LEARNING_RATE,
            lr_scheduler_type="constant",
            max_length=MAX_LENGTH,
            completion_only_loss=True,
            gradient_checkpointing=False,
            bf16=False,
            use_cpu=True,
            save_strategy="no",
            report_to=[],
            seed=0,
        ),
    )
    began = time.perf_counter()
    trainer.train()
    seconds = time.perf_counter() - began
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    loss = trainer.evaluate()["eval_loss"]
    return {"seconds": seconds, "steps": trainer.state.global_step, "peak_mib": peak / 1024, "val_loss": loss}


def measured(side: str, python: str, options: argparse.Namespace) -> dict[str, float]:
    """Run one side in its own process and read its last line."""
    command = [python, __file__, "--side", side, "--train", str(options.train), "--val", str(options.val)]
    if side == "trl":
        from lightllm.models import resolve_checkpoint

        command += ["--checkpoint", resolve_checkpoint("smollm2-135m-instruct")]
    output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
    result: dict[str, float] = json.loads(output.splitlines()[-1])
    print(side, json.dumps(result), flush=True)
    return result


def main() -> None:
    """Run both sides and print the ratios."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--train", type=Path, required=True)
    parser.add_argument("--val", type=Path, required=True)
    parser.add_argument("--peer-python", default=sys.executable)
    parser.add_argument("--side", choices=["ours", "products", "trl"], help=argparse.SUPPRESS)
    parser.add_argument("--checkpoint", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.side == "ours":
        print(json.dumps(ours(str(options.train), str(options.val))))
        return
    if options.side == "products":
        print(json.dumps(products(str(options.train), str(options.val))))
        return
    if options.side == "trl":
        print(json.dumps(trl(str(options.train), str(options.val), options.checkpoint)))
        return
    with tempfile.TemporaryDirectory() as folder:
        options.train = first_rows(options.train, ROWS, Path(folder))
        (Path(folder) / "val").mkdir()
        options.val = first_rows(options.val, VALIDATION_ROWS, Path(folder) / "val")
        mine = measured("ours", sys.executable, options)
        alone = measured("products", sys.executable, options)
        peer = measured("trl", options.peer_python, options)
    ratios = {
        "examples_per_s_ratio": (ROWS / mine["seconds"]) / (ROWS / peer["seconds"]),
        "peak_memory_ratio": mine["peak_mib"] / peer["peak_mib"],
        "matmul_share": alone["seconds"] / mine["seconds"],
        "val_loss_difference": mine["val_loss"] - peer["val_loss"],
    }
    print(json.dumps({name: round(value, 4) for name, value in ratios.items()}))


if __name__ == "__main__":
    main()
