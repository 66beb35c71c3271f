"""The verbs that need no Trainer: generate, chat, export, configs.

Nothing heavy is imported here, not even for type checking: the parser follows such imports, and help is to be quick.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Literal

from jsonargparse import ArgumentParser

from lightllm.cli import configs as shipped
from lightllm.cli.arguments import parse
from lightllm.cli.errors import run_explained
from lightllm.generate.decoding import Decoding
from lightllm.runs import RunFolder

Format = Literal["merged", "factored", "adapter", "torchao", "gguf"]
GGUFType = Literal["F32", "F16", "BF16", "Q8_0", "Q4_0", "Q4_1"]


def main(verb: str, arguments: list[str]) -> int:
    """Run one of the plain verbs; the exit status."""
    function = VERBS[verb]
    declare = partial(_declare, verb)
    return run_explained(f"lightllm {verb}", lambda: function(**parse(verb, function, USAGE[verb], arguments, declare)))


def _declare(verb: str, parser: ArgumentParser) -> None:
    if verb == "generate":
        parser.add_argument("--as_chat", action="store_true", help="Put the prompt into the model's chat template.")
    if verb == "configs":
        parser.add_argument("name", nargs="?", type=str, help="Which to copy; all are listed without it.")


def generate(
    model: str,
    prompt: str,
    as_chat: bool = False,
    checkpoint: str = "best",
    decoding: Decoding = Decoding(),  # noqa: B008  (frozen, and jsonargparse shows its fields)
) -> int:
    """Continue a prompt, and print the continuation as it comes.

    Args:
        model: A run folder, a Hugging Face folder, a hub id, a GGUF file or a packaged model.
        prompt: The text; `-` reads it from standard input.
        as_chat: Put the prompt as a user's turn into the model's chat template, and print the answer alone.
        checkpoint: Of a run: best, newest or a file.
        decoding: How tokens are chosen.
    """
    from lightllm.cli.rebuild import load
    from lightllm.generate import stream

    loaded = load(model, checkpoint)
    text = sys.stdin.read() if prompt == "-" else prompt
    if not as_chat:
        print(text, end="")
    question = [{"role": "user", "content": text}] if as_chat else text
    for piece in stream(loaded.network, loaded.tokenizer, question, decoding):
        print(piece, end="", flush=True)
    print()
    return 0


def chat(
    model: str,
    system: str | None = None,
    checkpoint: str = "best",
    decoding: Decoding = Decoding(temperature=0.7, top_p=0.95),  # noqa: B008
) -> int:
    """Talk to a model in the terminal; /reset forgets, /quit ends.

    Args:
        model: A run folder, a Hugging Face folder, a hub id, a GGUF file or a packaged model.
        system: What the system turn says.
        checkpoint: Of a run: best, newest or a file.
        decoding: How tokens are chosen.
    """
    from lightllm.cli.rebuild import load
    from lightllm.generate import converse

    loaded = load(model, checkpoint)
    converse(loaded.network, loaded.tokenizer, decoding, system=system)
    return 0


def export(
    model: str,
    to: str | None = None,
    format: Format = "merged",
    dtype: Literal["float32", "bfloat16", "float16"] | None = None,
    gguf_type: GGUFType | None = None,
    gguf_embedding: GGUFType | None = None,
    checkpoint: str = "best",
) -> int:
    """Write a model as an ordinary Hugging Face folder, an adapter, or a GGUF file; read back and compared.

    Args:
        model: A run folder, or anything else that holds a model.
        to: Where to; RUN/export, RUN/export-torchao or RUN/export.gguf by default.
        format: `merged` is a whole Hugging Face folder, `factored` one that keeps thin matrices and has code to load
            them, `adapter` peft's layout, `torchao` a folder with the few bits that a run was trained for, `gguf` a
            file for llama.cpp.
        dtype: Of merged or factored weights.
        gguf_type: Of a GGUF file's matrices; the type that a run was trained for, or else F16, by default.
        gguf_embedding: Of its embedding and head; 16 bits for a run that was trained for few, else Q8_0 beside Q4_0 and
            Q4_1, else as the matrices, by default.
        checkpoint: Of a run: best, newest or a file.
    """
    import torch

    from lightllm.cli.rebuild import load
    from lightllm.export import classifier_of, write_gguf
    from lightllm.export import export as write

    run = RunFolder(model)
    if to is None and not run.exists:
        raise ValueError(f"{model!r} is no run folder: say with --to where to write")
    loaded = load(model, checkpoint)
    names = {"gguf": "export.gguf", "torchao": "export-torchao"}
    target = Path(to) if to is not None else run.path / names.get(format, run.export.name)
    if format == "gguf":
        report = write_gguf(loaded.network, loaded.tokenizer, target, gguf_type, gguf_embedding)
    else:
        report = write(
            loaded.network,
            loaded.tokenizer,
            target,
            layout=format,
            dtype=getattr(torch, dtype) if dtype else None,
            base_model=loaded.base,
            classifier=None if loaded.module is None else classifier_of(loaded.module),
        )
    print(report.describe())
    if run.exists:
        from lightllm.cli.ledger_report import enter_export

        enter_export(model, report.path)
    return 0


def configs(name: str | None = None, to: str = ".") -> int:
    """List the configurations that come with the package, or copy one.

    Args:
        name: Which to copy, as listed; all are listed without it.
        to: File or folder of the copy.
    """
    if name is None:
        names = shipped.config_names()
        width = max(map(len, names), default=0)
        for one in names:
            print(f"{one:{width}}  {shipped.summary(one)}")
        return 0
    print(shipped.copy_config(name, Path(to)))
    return 0


VERBS: dict[str, Callable[..., int]] = {"generate": generate, "chat": chat, "export": export, "configs": configs}

USAGE = {
    "generate": "MODEL PROMPT [--as_chat] [--decoding.temperature 0.8 …]",
    "chat": "MODEL [--system TEXT] [--decoding.temperature 0.8 …]",
    "export": "MODEL [--to PATH] [--format merged | factored | adapter | torchao | gguf]",
    "configs": "[NAME [--to PATH]]",
}
