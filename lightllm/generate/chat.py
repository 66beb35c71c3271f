"""A chat with a network in the terminal."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import closing
from typing import TYPE_CHECKING

from lightllm.generate.batches import num_new_tokens
from lightllm.generate.decoding import GREEDY, Decoding
from lightllm.generate.prompt import Message, encode_prompt
from lightllm.generate.streaming import stream

if TYPE_CHECKING:
    from rich.console import Console
    from torch import nn
    from transformers import PreTrainedTokenizerBase

COMMANDS = "/reset begins anew, /quit ends, Ctrl-C stops an answer"
"""What can be typed instead of a question."""


def converse(
    network: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    settings: Decoding = GREEDY,
    *,
    system: str | None = None,
    read: Callable[[], str] | None = None,
    console: Console | None = None,
) -> list[Message]:
    """Ask for lines and stream answers to them until `/quit` or the end of the input.

    When the chat outgrows the network's positions, its oldest questions and answers are left out, and that is said.

    Args:
        network: A transformers causal language model, or a peft model around one.
        tokenizer: The network's.
        settings: How to choose tokens.
        system: What the system's turn says, if there is to be one.
        read: Gives the user's next line and raises `EOFError` after the last; by default it asks in the terminal.
        console: Where answers go; the terminal, by default.

    Returns:
        The chat since its last beginning.

    Raises:
        ValueError: The network cannot generate.
    """
    from rich.console import Console

    console = console if console is not None else Console(highlight=False)
    read = read if read is not None else lambda: console.input("[bold cyan]> [/]")
    opening: list[Message] = [] if system is None else [{"role": "system", "content": system}]
    messages = list(opening)
    console.print(f"[dim]{COMMANDS}[/]")
    while (line := _next_line(read)) is not None and line != "/quit":
        if line == "/reset":
            messages = list(opening)
            console.print("[dim]A new chat.[/]")
        elif line.startswith("/") and " " not in line:
            console.print(f"[dim]No such command: {COMMANDS}[/]")
        elif line:
            asked: list[Message] = [*messages, {"role": "user", "content": line}]
            kept = _fitting(network, tokenizer, asked, len(opening), settings)
            if kept is None:
                console.print("[red]That is longer than the network's positions: shorten it.[/]")
                continue
            if len(kept) < len(asked):
                console.print(f"[dim]{len(asked) - len(kept)} oldest turns no longer fit and are left out.[/]")
            messages = [*kept, {"role": "assistant", "content": _answer(network, tokenizer, kept, settings, console)}]
    return messages


def _next_line(read: Callable[[], str]) -> str | None:
    try:
        return read().strip()
    except (EOFError, KeyboardInterrupt):
        return None


def _answer(
    network: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    messages: list[Message],
    settings: Decoding,
    console: Console,
) -> str:
    """Stream the answer to the last of `messages`; what came before Ctrl-C, if that is pressed."""
    pieces: list[str] = []
    with closing(stream(network, tokenizer, messages, settings)) as text:
        try:
            for piece in text:
                pieces.append(piece)
                console.print(piece, end="", markup=False, highlight=False, soft_wrap=True)
        except KeyboardInterrupt:
            console.print(" [dim](stopped)[/]", end="")
    console.print()
    return "".join(pieces)


def _fitting(
    network: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    messages: list[Message],
    num_opening: int,
    settings: Decoding,
) -> list[Message] | None:
    """`messages` without as many of the oldest pairs of turns as leave room for an answer; None if nothing does."""
    for start in range(num_opening, len(messages), 2):
        kept = messages[:num_opening] + messages[start:]
        length = len(encode_prompt(tokenizer, kept))
        try:
            room = num_new_tokens(network, length, settings.max_new_tokens)
        except ValueError:
            continue
        # An answer may be cut short by the last positions, but not to a few words.
        if room >= min(settings.max_new_tokens, _SHORTEST_ANSWER):
            return kept
    return None


_SHORTEST_ANSWER = 64
"""Tokens that are kept free for an answer."""
