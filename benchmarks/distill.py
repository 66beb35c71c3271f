"""Distillation of SmolLM2-135M into every third of its layers, beside TRL's GKD trainer: the same chats and tokens.

    python benchmarks/distill.py --train chats.jsonl [--peer-python PYTHON_WITH_TRL]

Each side runs in a process of its own, TRL's by `--peer-python`: 64 chats in 8 optimizer steps of 8, all of the
student trains, forward KL at temperature 1 on answers only, bfloat16 weights on both sides; ours once with a live
teacher and once with a cached one, which a process before asks. Training time is from the first step to the last;
memory is the process's peak. Both sides count the answers' tokens; TRL also the line break behind each
answer, one a chat. The last line is JSON: our examples/s over TRL's, and our peak memory over TRL's.
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

ROWS, ROWS_PER_STEP, STEP, LEARNING_RATE, MAX_LENGTH, K = 64, 8, 3, 1e-4, 512, 64
NAME = "smollm2-135m-instruct"


def first_rows(file: Path, folder: Path) -> str:
    """A copy of the first rows of a JSON lines file, so that both sides read the same."""
    copy = folder / file.name
    copy.write_text("".join(line + "\n" for line in file.read_text().splitlines()[:ROWS]))
    return str(copy)


def parts(train: str, cache: str | None) -> tuple[Any, Any]:
    """The objective and the data of our side; with a cached teacher, whose answers are in a folder, or a live one."""
    import torch

    from lightllm.datamodules import Batches, ChatData, Reading
    from lightllm.models import EveryNthLayer, Pretrained
    from lightllm.modules import Distillation, Schedule, TeacherCache

    torch.manual_seed(0)
    module = Distillation(
        EveryNthLayer(NAME, STEP, dtype="bfloat16"),
        teacher=Pretrained(NAME, dtype="bfloat16"),
        cached=None if cache is None else TeacherCache(K, cache),
        optimizer=lambda parameters: torch.optim.AdamW(parameters, lr=LEARNING_RATE, weight_decay=0.0, fused=True),
        schedule=Schedule("constant"),
    )
    batches = Batches("packed", documents=ROWS_PER_STEP)
    return module, ChatData(train, max_length=MAX_LENGTH, batches=batches, reading=Reading(val_fraction=0.0))


def asked(train: str, cache: str) -> dict[str, Any]:
    """Ask the teacher once."""
    from lightllm.teach import teach

    began = time.perf_counter()
    store = teach(*parts(train, cache))["train"].store
    return {
        "seconds": time.perf_counter() - began,
        "target_tokens": store.num_targets,
        "bytes_per_target": store.bytes_per_target,
        **store.measured._asdict(),
    }


def ours(train: str, cache: str | None) -> dict[str, Any]:
    """One run of lightllm, from Python."""
    from lightning.pytorch import Callback, Trainer

    class Watch(Callback):
        began = 0.0
        ended = 0.0
        targets = 0

        def on_train_start(self, *_: object) -> None:
            self.losses: list[float] = []
            self.began = time.perf_counter()

        def on_train_batch_end(self, trainer: Trainer, module: object, outputs: Any, *_: object) -> None:
            self.losses.append(float(outputs["loss_sum"] / outputs["weight"]))
            self.targets += int(outputs["weight"])

        def on_train_end(self, *_: object) -> None:
            self.ended = time.perf_counter()

    watch = Watch()
    module, data = parts(train, cache)
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
    command = [python, __file__, "--side", side, "--train", str(options.train), "--cache", options.cache]
    if side == "trl":
        from lightllm.models import resolve_checkpoint

        command += ["--checkpoint", resolve_checkpoint(NAME)]
    output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
    result: dict[str, Any] = json.loads(output.splitlines()[-1])
    print(side, json.dumps(result), flush=True)
    return result


def one_side(options: argparse.Namespace) -> dict[str, Any]:
    """What a process of its own does."""
    train = str(options.train)
    if options.side == "trl":
        return trl(train, options.checkpoint)
    if options.side == "ask":
        return asked(train, options.cache)
    return ours(train, options.cache if options.side == "cached" else None)


def main() -> None:
    """Run all sides and print the ratios."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--train", type=Path, required=True)
    parser.add_argument("--peer-python", default=sys.executable)
    parser.add_argument("--side", choices=["ask", "cached", "live", "trl"], help=argparse.SUPPRESS)
    parser.add_argument("--checkpoint", help=argparse.SUPPRESS)
    parser.add_argument("--cache", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.side is not None:
        print(json.dumps(one_side(options)))
        return
    with tempfile.TemporaryDirectory() as folder:
        options.train, options.cache = first_rows(options.train, Path(folder)), str(Path(folder) / "answers")
        measured("ask", sys.executable, options)
        cached, live = (measured(side, sys.executable, options) for side in ("cached", "live"))
        peer = measured("trl", options.peer_python, options)
    ratios = {
        "cached_ratio": peer["seconds"] / cached["seconds"],
        "live_ratio": peer["seconds"] / live["seconds"],
        "peak_memory_ratio": {
            name: round(side["peak_mib"] / peer["peak_mib"], 4) for name, side in (("cached", cached), ("live", live))
        },
    }
    print(json.dumps({name: value if isinstance(value, dict) else round(value, 4) for name, value in ratios.items()}))


if __name__ == "__main__":
    main()
