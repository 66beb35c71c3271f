"""The command of the training verbs: LightningCLI with a run folder, and with what every run has."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal

import torch
import yaml
from lightning.pytorch import Callback, LightningDataModule, Trainer
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from lightning.pytorch.strategies import StrategyRegistry
from lightning.pytorch.utilities.rank_zero import rank_zero_only
from typing_extensions import override

import lightllm.datamodules
import lightllm.models  # noqa: F401  (importing the parts lets configurations name them by class alone)
from lightllm.callbacks import (
    Checkpoint,
    Interruption,
    KeepTokenizer,
    NetworkSize,
    NonFiniteLoss,
    Predictions,
    ProgressBar,
    RandomState,
    RewindMetrics,
    SharedRunFolder,
    Throughput,
)
from lightllm.checkpoint_io import AtomicCheckpointIO
from lightllm.cli.explain import explain
from lightllm.cli.spelling import nearest
from lightllm.loggers import loggers
from lightllm.modules import LanguageModule
from lightllm.runs import RunFolder, numbered

Log = Literal["csv", "tensorboard", "wandb"]

USAGE = {
    "fit": "lightllm fit --config FILE [--config OVERLAY …] [--any.field VALUE …]\n"
    "       lightllm fit --resume RUN | auto [--any.field VALUE …]",
    "validate": "lightllm validate RUN [--any.field VALUE …]",
    "test": "lightllm test RUN [--any.field VALUE …]",
    "teach": "lightllm teach --config FILE [--any.field VALUE …]",
    "plan": "lightllm plan --config FILE --hardware MACHINE [--any.field VALUE …]",
    "predict": "lightllm predict RUN [--predictions.what losses | generations] [--any.field VALUE …]",
}

DESCRIPTION = """What can be set in a configuration; each field is a flag as well. Later files and flags override
earlier ones, `callbacks+:` appends to a list. The fields of a part: --model.help CLASS, --data.help CLASS; all fields
with their values: --print_config. RUN is a run folder: its own configuration is read, and its best checkpoint measured,
or --weights newest | FILE. --resume auto goes on with the run that the configuration names, if it was begun."""


class CommandParser(LightningArgumentParser):
    """A parser that takes names as they are written: `--trainer.max_step` is a mistake and no abbreviation."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **{"allow_abbrev": False, **kwargs})

    @override
    def parse_args(self, args: Sequence[str] | None = None, *rest: Any, **kwargs: Any) -> Any:  # type: ignore[override]
        # Jsonargparse hands a nested `--data.batches.documents null` on to itself as `--batches.documents=None`.
        if args is not None:
            args = [f"{one[:-5]}=null" if one.startswith("--") and one.endswith("=None") else one for one in args]
        return super().parse_args(args, *rest, **kwargs)


class TrainingCommand(LightningCLI):
    """Parses a configuration and makes its parts; a run folder, checkpoints and metrics belong to all of them.

    Args:
        verb: fit, validate, test, predict, teach or plan.
        arguments: The command line after the verb.
        run: The run that is resumed or measured; None starts a new one.
        go_on: If the run that the configuration names was begun before, it is that which is resumed.

    Raises:
        ValueError: The configuration is wrong; the message names the nearest right spelling.
    """

    def __init__(self, verb: str, arguments: list[str], run: RunFolder | None = None, go_on: bool = False) -> None:
        self.verb = verb
        self.run_folder = run if run is not None else RunFolder(".")
        self.is_new = run is None
        self._go_on = go_on
        self._trial: TemporaryDirectory[str] | None = None
        super().__init__(
            LanguageModule,
            LightningDataModule,
            save_config_callback=None,
            seed_everything_default=1,
            parser_class=CommandParser,
            parser_kwargs={
                "prog": f"lightllm {verb}",
                "usage": USAGE[verb],
                "description": DESCRIPTION,
                "exit_on_error": False,
            },
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
        try:
            self.config = parser.parse_args(args)
        except argparse.ArgumentError as error:
            options = [option.removeprefix("--") for option in parser._option_string_actions]
            raise ValueError(explain(str(error), options)) from error

    @override
    def before_instantiate_classes(self) -> None:
        if not self.is_new:
            self._settle_in(self.run_folder)
        elif self.verb == "fit" and self.config.trainer.fast_dev_run:
            self._trial = TemporaryDirectory(prefix="lightllm-trial-")
            self._settle_in(RunFolder(self._trial.name))
        else:
            files = self.config.get("config")
            wanted = self.config.run or f"runs/{Path(str(files[0])).stem if files else self.verb}"
            self.is_new = not (self._go_on and RunFolder(wanted).exists)
            for run in numbered(wanted):
                self._settle_in(run)
                # Further ranks learn from the first which folder it took (`SharedRunFolder`).
                takes = self.is_new and self.verb == "fit" and bool(_is_first_rank())
                if not takes or run.begin(self._resolved()):
                    break

    def _settle_in(self, run: RunFolder) -> None:
        self.run_folder = run
        self.config.run = self.config.trainer.default_root_dir = str(run.path)

    def _resolved(self) -> str:
        """The whole configuration, as it is kept in the run folder."""
        config = yaml.safe_load(self.parser.dump(self.config, skip_none=False))
        config.pop("config", None)
        return str(yaml.safe_dump(config, sort_keys=False))

    @override
    def instantiate_classes(self) -> None:
        try:
            super().instantiate_classes()
        except BaseException:
            self.release()
            raise

    @override
    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        config = self.config_init.trainer
        if config.logger is None:
            # A measurement has no step, so it is printed and no row of the run's curves.
            kwargs["logger"] = loggers([self.config.log], self.run_folder.path) if self.verb == "fit" else False
        plugins = config.plugins or []
        kwargs["plugins"] = [*(plugins if isinstance(plugins, list) else [plugins]), AtomicCheckpointIO()]
        kwargs["enable_model_summary"] = bool(config.enable_model_summary)  # NetworkSize says it in a line
        _check_strategy(config.strategy, config.accelerator)
        return super().instantiate_trainer(**kwargs)

    @override
    def _instantiate_trainer(self, config: dict[str, Any], callbacks: list[Callback]) -> Trainer:
        own = config["callbacks"] or []
        own = own if isinstance(own, list) else [own]
        always = [*callbacks, RandomState(), RewindMetrics(), KeepTokenizer(), NetworkSize(), NonFiniteLoss()]
        always.append(Interruption())
        if config.get("enable_progress_bar") is not False:
            always.append(ProgressBar())
        # A user's own callback of one of these classes stands in for the one that every run has.
        given = {type(callback) for callback in own}
        config["callbacks"] = [SharedRunFolder(), *own]
        return super()._instantiate_trainer(config, [one for one in always if type(one) not in given])

    @rank_zero_only
    def write_config(self) -> None:
        """Keep the configuration, which may differ from that of a run that is resumed, and have the loggers keep it."""
        self.run_folder.write_config(self._resolved())
        for logger in self.trainer.loggers:
            logger.log_hyperparams(yaml.safe_load(self._resolved()))

    @property
    def is_trial(self) -> bool:
        """Whether this is a `fast_dev_run`, which is over in a step or a few and leaves nothing behind."""
        return self._trial is not None

    def release(self) -> None:
        """Give the folder of a new run back, if nothing was trained; a trial's whatever happened."""
        if self._trial is not None:
            self._trial.cleanup()
        elif self.is_new and self.verb == "fit" and _is_first_rank():
            self.run_folder.release()


class PlanningCommand(TrainingCommand):
    """Makes the model and the data of a configuration, and no trainer: its devices need not be here."""

    @override
    def instantiate_classes(self) -> None:
        parts = self.config.clone()
        for name in [name for name in vars(parts) if name not in ("model", "data")]:
            del parts[name]
        made = self.parser.instantiate_classes(parts)
        self.model, self.datamodule = made.model, made.data


@rank_zero_only
def _is_first_rank() -> bool:
    return True


def _check_strategy(strategy: Any, accelerator: Any) -> None:
    known = StrategyRegistry.available_strategies()
    if isinstance(strategy, str) and strategy not in ("auto", *known):
        near = nearest(strategy, known)
        hint = f" (did you mean {near!r}?)" if near else ""
        raise ValueError(f"trainer.strategy: there is no strategy {strategy!r}{hint}")
    name = strategy if isinstance(strategy, str) else type(strategy).__name__
    if name.lower().startswith("fsdp") and (accelerator == "cpu" or not torch.cuda.is_available()):
        raise ValueError(
            f"trainer.strategy is {name}, Lightning's, which works on GPUs only; lightllm.parallel.ParallelStrategy "
            "shards on any device: add --config parallel/sharded.yaml"
        )
