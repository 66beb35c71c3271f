"""The verbs that run a Lightning Trainer: fit, validate, test, predict."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any, Literal

import yaml
from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_only
from typing_extensions import override

import lightllm.datamodules
import lightllm.models
import lightllm.modules  # noqa: F401  (importing the parts lets configurations name them by class alone)
from lightllm.callbacks import (
    Checkpoint,
    Interruption,
    KeepTokenizer,
    NonFiniteLoss,
    Predictions,
    ProgressBar,
    RandomState,
    RewindMetrics,
    Throughput,
)
from lightllm.checkpoint_io import AtomicCheckpointIO
from lightllm.cli.configs import shipped_config
from lightllm.cli.errors import nearest_spelling, run_explained
from lightllm.loggers import loggers
from lightllm.runs import RunFolder, choose_run

Log = Literal["csv", "tensorboard", "wandb"]


class TrainingCommand(LightningCLI):
    """LightningCLI with a run folder and with what every run has: checkpoints, metrics, a clean interruption.

    Args:
        verb: fit, validate, test or predict.
        arguments: The command line after the verb.
        run: The run that is resumed or measured; None starts a new one.
    """

    def __init__(self, verb: str, arguments: list[str], run: RunFolder | None = None) -> None:
        self.verb = verb
        self.run_folder = run
        super().__init__(
            LightningModule,
            LightningDataModule,
            save_config_callback=None,
            seed_everything_default=1,
            parser_kwargs={"prog": f"lightllm {verb}", "exit_on_error": False, "description": Trainer.__doc__},
            subclass_mode_model=True,
            subclass_mode_data=True,
            args=arguments,
            run=False,
            auto_configure_optimizers=False,
            load_from_checkpoint_support=False,
        )

    @override
    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        parser.add_argument("--run", type=str | None, default=None, help="Run folder; numbered if it is taken.")
        parser.add_argument("--log", type=Log, default="csv", help="Log there too; metrics.csv is always written.")
        parser.add_lightning_class_args(Checkpoint, "checkpoint")
        parser.add_lightning_class_args(Throughput, "throughput")
        parser.add_lightning_class_args(Predictions, "predictions")

    @override
    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        self.config = parser.parse_args(args)

    @override
    def before_instantiate_classes(self) -> None:
        if self.run_folder is None:
            first = str(self.config.config[0]) if self.config.get("config") else self.verb
            self.run_folder = choose_run(self.config.run or f"runs/{Path(first).stem}")
        self.config.run = str(self.run_folder.path)
        self.config.trainer.default_root_dir = str(self.run_folder.path)

    @override
    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        assert self.run_folder is not None
        if self.config_init.trainer.logger is None:
            # A measurement has no step, so it is printed and no row of the run's curves.
            kwargs["logger"] = loggers([self.config.log], self.run_folder.path) if self.verb == "fit" else False
        plugins = self.config_init.trainer.plugins or []
        kwargs["plugins"] = [*(plugins if isinstance(plugins, list) else [plugins]), AtomicCheckpointIO()]
        return super().instantiate_trainer(**kwargs)

    @override
    def _instantiate_trainer(self, config: dict[str, Any], callbacks: list[Callback]) -> Trainer:
        # A user's own callback of one of these classes stands in for the one that every run has.
        own = config["callbacks"] if isinstance(config["callbacks"], list) else [config["callbacks"]]
        given = {type(callback) for callback in own}
        always = [*callbacks, RandomState(), RewindMetrics(), KeepTokenizer(), NonFiniteLoss(), Interruption()]
        if config.get("enable_progress_bar") is not False:
            always.append(ProgressBar())
        return super()._instantiate_trainer(config, [one for one in always if type(one) not in given])

    @rank_zero_only
    def write_config(self) -> None:
        """Keep the resolved configuration in the run folder, and have the loggers keep it."""
        assert self.run_folder is not None
        config = yaml.safe_load(self.parser.dump(self.config, skip_none=False))
        config.pop("config", None)
        self.run_folder.path.mkdir(parents=True, exist_ok=True)
        self.run_folder.config.write_text(yaml.safe_dump(config, sort_keys=False))
        for logger in self.trainer.loggers:
            logger.log_hyperparams(config)


def main(verb: str, arguments: list[str]) -> int:
    """Run one of the training verbs; the exit status."""
    return run_explained(f"lightllm {verb}", lambda: _fit(arguments) if verb == "fit" else _measure(verb, arguments))


def _fit(arguments: list[str]) -> int:
    resume, arguments = _take_resume(arguments)
    run, checkpoint = None, None
    if resume == "auto":
        run = _configured_run(arguments)
    elif resume is not None:
        run = RunFolder(resume).require()
        arguments = ["--config", str(run.config), *arguments]
    if run is not None and run.exists:
        checkpoint = str(run.newest_checkpoint())
    command = _command("fit", arguments, run)
    command.write_config()
    assert command.run_folder is not None
    rank_zero_info(f"run folder: {command.run_folder.path}" + (f", resumed from {checkpoint}" if checkpoint else ""))
    command.trainer.fit(command.model, datamodule=command.datamodule, ckpt_path=checkpoint, weights_only=True)
    return 0


def _measure(verb: str, arguments: list[str]) -> int:
    if not arguments or arguments[0].startswith("-"):
        if {"-h", "--help"} & set(arguments):
            _command(verb, arguments, None)
        raise ValueError(f"name the run folder first: lightllm {verb} RUN")
    run = RunFolder(arguments[0]).require()
    command = _command(verb, ["--config", str(run.config), *arguments[1:]], run)
    getattr(command.trainer, verb)(
        command.model, datamodule=command.datamodule, ckpt_path=str(run.best_checkpoint()), weights_only=True
    )
    return 0


def _command(verb: str, arguments: list[str], run: RunFolder | None) -> TrainingCommand:
    """The parsed command with everything instantiated.

    Raises:
        ValueError: The configuration is wrong; the message names the nearest right spelling.
    """
    arguments = shipped_config(arguments)
    sys.argv = sys.argv[:1]  # LightningCLI warns of arguments that come both ways
    try:
        return TrainingCommand(verb, arguments, run)
    except argparse.ArgumentError as error:
        raise ValueError(nearest_spelling(str(error))) from error


def _take_resume(arguments: list[str]) -> tuple[str | None, list[str]]:
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--resume")
    known, rest = parser.parse_known_args(arguments)
    return known.resume, rest


def _configured_run(arguments: list[str]) -> RunFolder | None:
    """The run folder that this command line names, if a run was begun there."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--run")
    parser.add_argument("-c", "--config", action="append", default=[])
    known, _ = parser.parse_known_args(shipped_config(arguments))
    wanted = known.run
    for file in known.config:
        wanted = wanted or yaml.safe_load(Path(file).read_text()).get("run")
    if wanted is None and known.config:
        wanted = f"runs/{Path(known.config[0]).stem}"
    run = RunFolder(wanted) if wanted else None
    return run if run is not None and run.exists else None
