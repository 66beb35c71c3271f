"""One prompt's text as it comes."""

from __future__ import annotations

import queue
import threading
from collections.abc import Generator
from contextlib import closing
from typing import TYPE_CHECKING, cast

from lightllm.generate.batches import call_generate, check_generates, num_new_tokens
from lightllm.generate.decoding import GREEDY, Decoding
from lightllm.generate.prompt import Prompt, encode_prompt, incremental_text
from lightllm.generate.settings import generation_settings

if TYPE_CHECKING:
    from torch import Tensor, nn
    from transformers import GenerationConfig, PreTrainedTokenizerBase
    from transformers.generation.streamers import BaseStreamer


def stream(
    network: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    prompt: Prompt,
    settings: Decoding = GREEDY,
) -> Generator[str, None, None]:
    """Continue one prompt and give out its text as it comes; what `generate` returns, in pieces.

    Generation runs in a thread, which ends with this iterator: close it, and generation stops.

    Args:
        network: As in `generate`.
        tokenizer: The network's.
        prompt: What to continue.
        settings: How to choose tokens.

    Raises:
        ValueError: As in `generate`; whatever else goes wrong in the thread is raised here as it was there.
    """
    check_generates(network)
    ids = encode_prompt(tokenizer, prompt)
    configuration = generation_settings(network, tokenizer, settings)
    num_new_tokens(network, len(ids), settings.max_new_tokens)  # refuses here, not at the first piece
    return _stream_text(network, tokenizer, ids, configuration, settings.seed)


class _Cancelled(Exception):
    """Raised within generation when nobody reads its tokens any more."""


class _TokenQueue:
    """What transformers hands each new token to, after the prompt: a queue to another thread.

    It has the methods of transformers' `BaseStreamer` without being one, which would import transformers here.
    """

    def __init__(self) -> None:
        self.items: queue.SimpleQueue[int | BaseException | None] = queue.SimpleQueue()
        self.cancelled = threading.Event()
        self._prompt_passed = False

    def put(self, value: Tensor) -> None:
        if self.cancelled.is_set():
            raise _Cancelled
        if self._prompt_passed:
            self.items.put(int(value.item()))
        self._prompt_passed = True

    def end(self) -> None:
        self.items.put(None)


def _stream_text(
    network: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    ids: list[int],
    configuration: GenerationConfig,
    seed: int | None,
) -> Generator[str, None, None]:
    with closing(_stream_tokens(network, ids, configuration, seed)) as tokens:
        yield from incremental_text(tokenizer, ids, tokens)


def _stream_tokens(
    network: nn.Module, ids: list[int], configuration: GenerationConfig, seed: int | None
) -> Generator[int, None, None]:
    """New tokens up to the stop token, made in a thread that does not outlive this generator."""
    import torch

    from lightllm.models.inference import inference, network_device, own_random_numbers

    tokens = _TokenQueue()

    def run() -> None:
        try:
            with inference(network), own_random_numbers(network_device(network), seed):
                row = torch.tensor([ids])
                call_generate(network, row, torch.ones_like(row), configuration, cast("BaseStreamer", tokens))
        except _Cancelled:
            return
        except BaseException as error:  # noqa: BLE001  (raised again where the tokens are read)
            tokens.items.put(error)

    thread = threading.Thread(target=run, name="generation", daemon=True)
    thread.start()
    try:
        while (item := tokens.items.get()) is not None:
            if isinstance(item, BaseException):
                raise item
            if item in (configuration.eos_token_id or []):
                break
            yield item
    finally:
        tokens.cancelled.set()
        thread.join()
