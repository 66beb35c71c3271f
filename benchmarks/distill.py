"""Distillation of SmolLM2-135M into every third of its layers, beside TRL's GKD trainer: the same chats and tokens.

    python benchmarks/distill.py --train chats.jsonl [--peer-python PYTHON_WITH_TRL]

Each side runs in a process of its own, TRL's by `--peer-python`: 64 chats in 8 optimizer steps of 8, all of the
student trains, forward KL at temperature 1 on answers only, bfloat16 weights on both sides. Training time is from the
first step to the last; memory is the process's peak. The last line is JSON: our figures over TRL's.
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

ROWS, ROWS_PER_STEP, STEP, LEARNING_RATE, MAX_LENGTH = 64, 8, 3, 1e-4, 512
NAME = "smollm2-135m-instruct"


def first_rows(file: Path, folder: Path) -> str:
    """A copy of the first rows of a JSON lines file, so that both sides read the same."""
    copy = folder / file.name
    copy.write_text("".join(line + "\n" for line in file.read_text().splitlines()[:ROWS]))
    return str(copy)


def ours(train: str) -> dict[str, Any]:
    """One run of lightllm, from Python."""
    import torch
    from lightning.pytorch import Callback, Trainer

    from lightllm.datamodules import Batches, ChatData, Reading
    from lightllm.models import EveryNthLayer, Pretrained
    from lightllm.modules import Distillation, Schedule

    class Watch(Callback):
        began = 0.0
        ended = 0.0
        losses: list[float]
        targets = 0

        def on_train_start(self, *_: object) -> None:
            self.losses = []
            self.began = time.perf_counter()

        def on_train_batch_end(self, trainer: Trainer, module: object, outputs: Any, *_: object) -> None:
            self.losses.append(float(outputs["loss_sum"] / outputs["weight"]))
            self.targets += int(outputs["weight"])

        def on_train_end(self, *_: object) -> None:
            self.ended = time.perf_counter()

    torch.manual_seed(0)
    watch = Watch()
    module = Distillation(
        EveryNthLayer(NAME, STEP, dtype="bfloat16"),
        teacher=Pretrained(NAME, dtype="bfloat16"),
        optimizer=lambda parameters: torch.optim.AdamW(parameters, lr=LEARNING_RATE, weight_decay=0.0, fused=True),
        schedule=Schedule("constant"),
    )
    data = ChatData(
        train,
        max_length=MAX_LENGTH,
        batches=Batches("packed", documents=ROWS_PER_STEP),
        reading=Reading(val_fraction=0.0),
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
        callbacks=[watch],
    )
    trainer.fit(module, datamodule=data)
    return {
        "seconds": watch.ended - watch.began,
        "steps": trainer.global_step,
        "peak_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
        "target_tokens": watch.targets,
        "losses": [round(watch.losses[0], 4), round(watch.losses[-1], 4)],
    }


def trl(train: str, checkpoint: str) -> dict[str, Any]:
    """One run of TRL's GKDTrainer."""
    import torch
    from datasets import load_dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from trl.experimental.gkd import GKDConfig, GKDTrainer

    teacher, student = (AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.bfloat16) for _ in range(2))
    student.model.layers = torch.nn.ModuleList(student.model.layers[::STEP])
    student.config.num_hidden_layers = len(student.model.layers)
    for index, layer in enumerate(student.model.layers):
        layer.self_attn.layer_idx = index
    targets = []

    class Counting(GKDTrainer):  # type: ignore[misc]
        def compute_loss(self, model: Any, inputs: Any, *rest: Any, **options: Any) -> Any:
            targets.append(int((inputs["labels"][:, 1:] != -100).sum()))
            return super().compute_loss(model, inputs, *rest, **options)

    trainer = Counting(
        model=student,
        teacher_model=teacher,
        processing_class=AutoTokenizer.from_pretrained(checkpoint),
        train_dataset=load_dataset("json", data_files={"train": train})["train"],
        args=GKDConfig(
            output_dir=tempfile.mkdtemp(),
            per_device_train_batch_size=ROWS_PER_STEP,
            num_train_epochs=1,
            learning_rate=LEARNING_RATE,
            lr_scheduler_type="constant",
            max_length=MAX_LENGTH,
            lmbda=0.0,
            beta=0.0,
            temperature=1.0,
            gradient_checkpointing=False,
            bf16=False,
            use_cpu=True,
            logging_steps=1,
            save_strategy="no",
            report_to=[],
            seed=0,
        ),
    )
    began = time.perf_counter()
    trainer.train()
    seconds = time.perf_counter() - began
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    return {
        "seconds": seconds,
        "steps": trainer.state.global_step,
        "peak_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
        "target_tokens": sum(targets),
        "losses": [losses[0], losses[-1]],
    }


def measured(side: str, python: str, options: argparse.Namespace) -> dict[str, Any]:
    """Run one side in its own process and read its last line."""
    command = [python, __file__, "--side", side, "--train", str(options.train)]
    if side == "trl":
        from lightllm.models import resolve_checkpoint

        command += ["--checkpoint", resolve_checkpoint(NAME)]
    output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
    result: dict[str, Any] = json.loads(output.splitlines()[-1])
    print(side, json.dumps(result), flush=True)
    return result


def main() -> None:
    """Run all sides and print the ratios."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--train", type=Path, required=True)
    parser.add_argument("--peer-python", default=sys.executable)
    parser.add_argument("--side", choices=["live", "trl"], help=argparse.SUPPRESS)
    parser.add_argument("--checkpoint", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.side == "trl":
        print(json.dumps(trl(str(options.train), options.checkpoint)))
        return
    if options.side is not None:
        print(json.dumps(ours(str(options.train))))
        return
    with tempfile.TemporaryDirectory() as folder:
        options.train = first_rows(options.train, Path(folder))
        live = measured("live", sys.executable, options)
        peer = measured("trl", options.peer_python, options)
    ratios = {
        "live_ratio": peer["seconds"] / live["seconds"],
        "peak_memory_ratio": {"live": live["peak_mib"] / peer["peak_mib"]},
    }
    print(json.dumps(ratios))


if __name__ == "__main__":
    main()
