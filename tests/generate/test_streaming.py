import threading

import pytest
import torch
from tiny_networks import POSITIONS, tiny_llama, tiny_tokenizer

from lightllm.generate import Decoding, generate, stream


def generation_threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "generation"]


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_pieces_join_to_what_generate_returns(temperature: float) -> None:
    network, tokenizer = tiny_llama().train(), tiny_tokenizer()
    settings = Decoding(max_new_tokens=30, temperature=temperature)
    state = torch.get_rng_state()
    pieces = list(stream(network, tokenizer, "Call me", settings))
    assert ["".join(pieces)] == generate(network, tokenizer, ["Call me"], settings)
    assert len(pieces) > 1
    assert network.training
    assert torch.equal(state, torch.get_rng_state())
    assert not generation_threads()


def test_the_stop_token_ends_the_stream() -> None:
    network, tokenizer = tiny_llama(), tiny_tokenizer()
    settings = Decoding(max_new_tokens=30)
    ids = network.generate(torch.tensor([[5]]), max_new_tokens=30, do_sample=False, pad_token_id=1)[0].tolist()
    stop = next(token for token in ids[6:] if token not in ids[:6])
    tokenizer.eos_token = tokenizer.convert_ids_to_tokens(stop)
    text = "".join(stream(network, tokenizer, [5], settings))
    assert text == tokenizer.decode(ids[1 : ids.index(stop)])


def test_closing_the_stream_stops_the_generation() -> None:
    network, tokenizer = tiny_llama().train(), tiny_tokenizer()
    calls = []
    network.register_forward_hook(lambda *_: calls.append(1))
    pieces = stream(network, tokenizer, "Call me", Decoding(max_new_tokens=POSITIONS))
    next(pieces)
    pieces.close()
    assert len(calls) < POSITIONS - 10
    assert not generation_threads()
    assert network.training


def test_an_error_in_the_thread_reaches_the_reader() -> None:
    network = tiny_llama().train()

    def fail(*_: object) -> None:
        raise RuntimeError("out of memory")

    network.model.layers[0].register_forward_hook(fail)
    with pytest.raises(RuntimeError, match="out of memory"):
        list(stream(network, tiny_tokenizer(), "Call me"))
    assert network.training
    assert not generation_threads()


def test_a_prompt_that_fills_the_positions_is_refused_at_once() -> None:
    with pytest.raises(ValueError, match="leaves no room"):
        stream(tiny_llama(), tiny_tokenizer(), [5] * POSITIONS)
