"""The verbs that run a Lightning Trainer: fit, validate, test, predict."""

from __future__ import annotations

import argparse
from pathlib import Path

from lightning.pytorch.utilities.rank_zero import rank_zero_info

from lightllm.callbacks import Checkpoint
from lightllm.checkpoint_io import newest_checkpoint, read_entry
from lightllm.cli.command import TrainingCommand
from lightllm.cli.configs import found_configs
from lightllm.cli.errors import run_explained
from lightllm.cli.memory_warning import warn_of_memory
from lightllm.cli.teach import naming_the_command
from lightllm.runs import RunFolder
from lightllm.sharded_checkpoint import restore_former

AUTO = "auto"


def main(verb: str, arguments: list[str]) -> int:
    """Run one of the training verbs; the exit status."""
    return run_explained(f"lightllm {verb}", lambda: _fit(arguments) if verb == "fit" else _measure(verb, arguments))


def _fit(arguments: list[str]) -> int:
    resume, arguments = _take_option("--resume", arguments)
    run = None
    if resume is not None and resume != AUTO:
        run = RunFolder(resume).require()
        arguments = ["--config", str(run.config), *arguments]
    command = TrainingCommand("fit", found_configs(arguments), run, go_on=resume == AUTO)
    restore_former(command.run_folder.checkpoints)
    checkpoint = None if command.is_new else newest_checkpoint(command.run_folder.checkpoints)
    _read_records(command, checkpoint)
    try:
        command.write_config()
        rank_zero_info(_beginning(command, checkpoint))
        if not command.is_trial:
            warn_of_memory(command.model, command.datamodule, command.trainer)
        with naming_the_command(arguments):
            command.trainer.fit(command.model, datamodule=command.datamodule, ckpt_path=checkpoint, weights_only=True)
    finally:
        command.release()
    _say_what_next(command)
    return 0


def _measure(verb: str, arguments: list[str]) -> int:
    weights, arguments = _take_option("--weights", arguments)
    run, checkpoint = None, None
    if arguments and not arguments[0].startswith("-"):
        run = RunFolder(arguments[0]).require()
        arguments = ["--config", str(run.config), *arguments[1:]]
        checkpoint = run.checkpoint(weights or "best")
    elif not arguments:
        raise ValueError(f"name the run folder first: lightllm {verb} RUN")
    command = TrainingCommand(verb, found_configs(arguments), run)
    _read_records(command, checkpoint)
    rank_zero_info(f"weights: {checkpoint or 'as the network comes'}")
    measure = getattr(command.trainer, verb)
    with naming_the_command(arguments):
        measure(command.model, datamodule=command.datamodule, ckpt_path=checkpoint, weights_only=True)
    if verb == "predict":
        rank_zero_info(f"written: {command.run_folder.predictions}")
    return 0


def _read_records(command: TrainingCommand, checkpoint: Path | None) -> None:
    """Have the network built as the checkpoint's was: Lightning reads it when that is done."""
    if checkpoint is not None:
        command.model.records = read_entry(checkpoint, "transformations", {})


def _take_option(name: str, arguments: list[str]) -> tuple[str | None, list[str]]:
    """The value of an option that is no part of a configuration, and the other arguments."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    parser.add_argument(name, dest="value")
    try:
        known, rest = parser.parse_known_args(arguments)
    except argparse.ArgumentError as error:
        raise ValueError(str(error)) from error
    return known.value, rest


def _beginning(command: TrainingCommand, checkpoint: Path | None) -> str:
    if command.is_trial:
        return "a trial: nothing of it is kept"
    run = f"run folder: {command.run_folder.path}"
    if command.is_new:
        return run
    return run + (f", resumed from {checkpoint}" if checkpoint else ", which has no checkpoint yet: from the beginning")


def _say_what_next(command: TrainingCommand) -> None:
    run = command.run_folder
    if command.is_trial:
        return
    checkpoints = [one for one in command.trainer.checkpoint_callbacks if isinstance(one, Checkpoint)]
    best = checkpoints[0].best_model_score if checkpoints else None
    found = f"; best {checkpoints[0].monitor} {best:.4g}" if best is not None else ""
    rank_zero_info(f"done after {command.trainer.global_step} steps: {run.path}{found}")
    tokenizer = command.model.tokenizer
    if command.model.task != "causal":  # it writes no text
        rank_zero_info(f"next: lightllm validate {run.path}    lightllm export {run.path}")
        return
    # A network that continues text is asked with some chance: the likeliest token again and again is a young one's rut.
    continues = f'generate {run.path} "…" --decoding.temperature 0.8'
    asks = f"chat {run.path}" if tokenizer and tokenizer.chat_template else continues
    rank_zero_info(f"next: lightllm {asks}    lightllm validate {run.path}    lightllm export {run.path}")
