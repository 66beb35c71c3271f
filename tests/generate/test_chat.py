import io
from collections.abc import Iterator

import pytest
from rich.console import Console
from tiny_networks import tiny_llama, tiny_tokenizer
from transformers import LlamaForCausalLM

from lightllm.generate import Decoding, Message, chat, converse, generate

SETTINGS = Decoding(max_new_tokens=6)


def long_llama(positions: int = 400) -> LlamaForCausalLM:
    network = tiny_llama()
    network.config.max_position_embeddings = positions
    return network


def run(network: LlamaForCausalLM, *lines: str, system: str | None = None) -> tuple[list[Message], str]:
    """Type `lines`, then end the input; the chat, and what was printed."""
    printed = io.StringIO()
    waiting = iter(lines)

    def read() -> str:
        line = next(waiting, None)
        if line is None:
            raise EOFError
        return line

    console = Console(file=printed, width=10_000)
    return converse(network, tiny_tokenizer(), SETTINGS, system=system, read=read, console=console), printed.getvalue()


def test_each_answer_is_to_the_whole_chat() -> None:
    network = long_llama()
    messages, printed = run(network, "Who?", "  Why? ", "", "/quit", "never read", system="Be brief.")
    assert [message["role"] for message in messages] == ["system", "user", "assistant", "user", "assistant"]
    assert messages[3]["content"] == "Why?"
    for turn in (2, 4):
        expected = generate(network, tiny_tokenizer(), [messages[:turn]], SETTINGS)
        assert [messages[turn]["content"]] == expected
        assert expected[0] in printed


def test_reset_begins_anew_and_other_commands_are_not_sent() -> None:
    network = long_llama()
    messages, printed = run(network, "Who?", "/reset", "/rest", "/ is what?", system="Be brief.")
    assert [message["content"] for message in messages][:2] == ["Be brief.", "/ is what?"]
    assert len(messages) == 3
    assert "No such command" in printed


def test_old_turns_are_left_out_when_positions_end() -> None:
    network = long_llama(positions=125)
    messages, printed = run(network, "a" * 20, "b" * 20, "c" * 20, system="s")
    assert "2 oldest turns no longer fit" in printed
    assert [message["content"] for message in messages if message["role"] != "assistant"] == ["s", "b" * 20, "c" * 20]
    messages, printed = run(network, "d" * 250)
    assert messages == []
    assert "longer than the network's positions" in printed


def test_ctrl_c_stops_an_answer_and_keeps_what_was_said(monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: object) -> Iterator[str]:
        yield "[bold]Be"
        raise KeyboardInterrupt

    monkeypatch.setattr(chat, "stream", interrupted)
    messages, printed = run(long_llama(), "Who?")
    assert messages[-1] == {"role": "assistant", "content": "[bold]Be"}
    assert "[bold]Be (stopped)" in printed
