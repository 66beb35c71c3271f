"""The command `lightllm`: a table of verbs. Each verb's imports happen when it is called, so that help is quick."""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Callable
from difflib import get_close_matches
from typing import NamedTuple


class Verb(NamedTuple):
    """One subcommand."""

    module: str
    """Where its `main(verb, arguments)` is."""
    summary: str
    """What it does, for the help."""


VERBS = {
    "fit": Verb("lightllm.cli.training", "train: pretrain, fine-tune, tune to preferences; --resume goes on"),
    "validate": Verb("lightllm.cli.training", "measure a run on its validation data"),
    "test": Verb("lightllm.cli.training", "measure a run on its test data"),
    "predict": Verb("lightllm.cli.training", "write each document's loss or generation as JSON lines"),
    "teach": Verb("lightllm.cli.teach", "ask a teacher once about a run's data, so that training does without it"),
    "generate": Verb("lightllm.cli.plain", "continue a prompt with a run's or an exported model"),
    "chat": Verb("lightllm.cli.plain", "talk to a run's or an exported model in the terminal"),
    "export": Verb("lightllm.cli.plain", "write a run as a Hugging Face folder, an adapter or a GGUF file"),
    "compress-report": Verb("lightllm.cli.compress_report", "what each step of compressing a run's network cost"),
    "quantize": Verb("lightllm.cli.quantize", "round a run or an export to 4 or 8 bits: to nearest, or by GPTQ"),
    "plan": Verb("lightllm.cli.plan", "how to spread a run over devices: memory and time of every sensible way"),
    "configs": Verb("lightllm.cli.plain", "list the shipped configurations, or copy one"),
}


def main(arguments: list[str] | None = None) -> int:
    """Run `lightllm VERB …`; the exit status."""
    arguments = sys.argv[1:] if arguments is None else arguments
    if not arguments or arguments[0] in ("-h", "--help"):
        print(_help())
        return 0 if arguments else 2
    if arguments[0] == "--version":
        from lightllm import __version__

        print(__version__)
        return 0
    name = arguments[0]
    if name not in VERBS:
        near = get_close_matches(name, VERBS, n=1)
        hint = f" (did you mean {near[0]!r}?)" if near else ""
        print(f"lightllm: no verb {name!r}{hint}\n\n{_help()}", file=sys.stderr)
        return 2
    from lightllm.cli.quiet import quiet_libraries

    quiet_libraries()
    _find_own_parts()
    run: Callable[[str, list[str]], int] = importlib.import_module(VERBS[name].module).main
    return run(name, arguments[1:])


def _find_own_parts() -> None:
    """Let configurations name classes in the user's own files, by their place below the current folder.

    It comes last on the path: a folder that is called `datasets` is not to hide the library.
    """
    if not {"", os.getcwd()} & set(sys.path):
        sys.path.append(os.getcwd())


def _help() -> str:
    width = max(map(len, VERBS))
    lines = [f"  {name:{width}}  {verb.summary}" for name, verb in VERBS.items()]
    return "\n".join(
        [
            "usage: lightllm VERB …        lightllm VERB --help",
            "",
            "Develop language models from the first token to the exported file.",
            "",
            *lines,
            "",
            "First run:  lightllm fit --config finetune/quickstart.yaml",
        ]
    )
