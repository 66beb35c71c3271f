"""`lightllm teach`: ask a teacher once about a run's data, so that training can do without it.

Nothing heavy is imported here: help is to be quick.
"""

from __future__ import annotations

import shlex
from collections.abc import Iterator
from contextlib import contextmanager

from lightllm.cli.errors import run_explained

HELP = """usage: lightllm teach --config FILE [--config OVERLAY …] [--any.field VALUE …]
       lightllm teach RUN [--any.field VALUE …]

Ask the teacher of a distillation once about every target token of the run's training, validation and test data, and
keep its likeliest tokens on disk: model.init_args.cached says how many (k) and where (folder, in $LIGHTLLM_CACHE by
default). `lightllm fit` with the same configuration then reads them and never builds the teacher.

The arguments are those of `lightllm fit`. What is there already is not asked again: answers are kept by teacher, data,
k, temperature and the student's vocabulary."""


def main(verb: str, arguments: list[str]) -> int:
    """Run the verb; the exit status."""
    if {"-h", "--help"} & set(arguments):
        print(HELP)
        return 0
    return run_explained(f"lightllm {verb}", lambda: _teach(arguments))


@contextmanager
def naming_the_command(arguments: list[str]) -> Iterator[None]:
    """Add the command that asks a teacher to the refusal of a run whose teacher was not asked.

    Args:
        arguments: The command line of the run after its verb.
    """
    from lightllm.modules.cached_teacher import NotTaught

    try:
        yield
    except NotTaught as error:
        raise ValueError(f"{error}:\n  lightllm teach {shlex.join(arguments)}") from error


def _teach(arguments: list[str]) -> int:
    from lightllm.cli.command import TrainingCommand
    from lightllm.cli.configs import found_configs
    from lightllm.modules import Distillation
    from lightllm.runs import RunFolder
    from lightllm.teach import teach

    run = None
    if arguments and not arguments[0].startswith("-"):
        run = RunFolder(arguments[0]).require()
        arguments = ["--config", str(run.config), *arguments[1:]]
    command = TrainingCommand("teach", found_configs(arguments), run)
    if not isinstance(command.model, Distillation):
        raise ValueError(f"{type(command.model).__name__} has no teacher: `lightllm teach` is for a Distillation")
    device = command.trainer.strategy.root_device
    for split, taught in teach(command.model, command.datamodule, device).items():
        print(f"{split}: {'written' if taught.new else 'was there already'}: {taught.store.folder}")
        print(f"  {taught.store.describe()}")
    return 0
