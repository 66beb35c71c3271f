"""The arguments of the verbs that need no Trainer: read off the function that does the work.

Nothing heavy is imported here: help is to be quick.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

from jsonargparse import ArgumentParser


def parse(
    verb: str,
    function: Callable[..., object],
    usage: str,
    arguments: list[str],
    declare: Callable[[ArgumentParser], None] | None = None,
) -> dict[str, Any]:
    """The arguments of a verb's function.

    Args:
        verb: As it is typed.
        function: What the verb does, or a dataclass of what is asked of it, for a verb of many options; parameters
            without a default are positional, the others are options.
        usage: What follows the verb in its usage.
        arguments: The command line after the verb.
        declare: Adds to the parser what should not be as the function's signature has it; those parameters are skipped.

    Raises:
        ValueError: One is missing, unknown or of another type.
    """
    parser = ArgumentParser(
        prog=f"lightllm {verb}",
        usage=f"lightllm {verb} {usage}",
        description=(function.__doc__ or "").splitlines()[0],
        exit_on_error=False,
        allow_abbrev=False,
    )
    if declare is not None:
        declare(parser)
    declared: set[str | int] = {action.dest for action in parser._actions}
    add = parser.add_class_arguments if isinstance(function, type) else parser.add_function_arguments
    names = add(function, as_positional=True, skip=declared)
    try:
        return dict(parser.instantiate_classes(parser.parse_args(arguments)).as_dict())
    except argparse.ArgumentError as error:
        from lightllm.cli.explain import explain

        options = [option.removeprefix("--") for option in parser._option_string_actions]
        raise ValueError(f"{explain(str(error), [*names, *options])}\nusage: {parser.usage}") from error
