"""`lightllm teach`: ask a teacher once about a run's data, so that training can do without it.

Nothing heavy is imported here: help is to be quick.
"""

from __future__ import annotations

import shlex
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING

from lightllm.cli.errors import run_explained

if TYPE_CHECKING:
    from lightllm.cli.command import TrainingCommand

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
    from lightllm.runs import RunFolder

    run = None
    if arguments and not arguments[0].startswith("-"):
        run = RunFolder(arguments[0]).require()
        arguments = ["--config", str(run.config), *arguments[1:]]
    _ask(TrainingCommand("teach", found_configs(arguments), run))
    return 0


def _ask(command: TrainingCommand) -> None:
    """Ask the teacher of a configuration about each split of its data.

    Raises:
        ValueError: The configuration has no cached teacher, or its data cannot be asked about.
    """
    from lightllm.datamodules.cache import cached_folder
    from lightllm.models import load_tokenizer
    from lightllm.models.hidden_states import check_packing
    from lightllm.modules import Distillation
    from lightllm.modules.cached_teacher import documents_to_ask
    from lightllm.teaching.store import TeacherStore
    from lightllm.teaching.write import Asking

    module, data = command.model, command.datamodule
    if not isinstance(module, Distillation) or module.cached is None:
        raise ValueError(
            f"this configuration's {type(module).__name__} has no teacher that is asked beforehand: set "
            "model.init_args.cached of a Distillation, such as {k: 64}"
        )
    if data.tokenizer is None and module.tokenizer_source is not None:
        data.tokenizer = load_tokenizer(module.tokenizer_source)
    data.prepare_data()
    data.setup("fit")
    documents = documents_to_ask(data)
    module.tokenizer = data.loaded_tokenizer
    module.plan = module.plan._replace(compile=False, gradient_checkpointing=False)
    module.configure_model()
    lesson, packed = module.lesson(), data.batches.mode == "packed"
    teacher = module.build_teacher()
    device = command.trainer.strategy.root_device
    asking = Asking(teacher.to(device), module.built_network.to(device), lesson, module.divergence, packed)
    if packed:
        for network in (asking.teacher, asking.student):
            check_packing(network)
    for split, chosen in documents.items():
        place = lesson.folder(chosen, module.cached.folder)
        known = place.is_dir()
        folder = cached_folder(place.parent.parent, place.parent.name, place.name, partial(asking.write, chosen))
        print(f"{split}: {'was there already' if known else 'written'}: {folder}")
        print(f"  {TeacherStore(folder).describe()}")
