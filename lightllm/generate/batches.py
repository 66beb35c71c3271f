"""Many prompts at once, through transformers' own generation."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from copy import copy
from itertools import takewhile
from typing import TYPE_CHECKING

from lightllm.generate.decoding import GREEDY, Decoding
from lightllm.generate.prompt import Prompt, encode_prompt, incremental_text
from lightllm.generate.settings import generation_settings

if TYPE_CHECKING:
    from peft import PromptLearningConfig
    from torch import Tensor, nn
    from transformers import GenerationConfig, PreTrainedTokenizerBase
    from transformers.generation.streamers import BaseStreamer


def generate(
    network: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Prompt],
    settings: Decoding = GREEDY,
    batch_size: int = 16,
) -> list[str]:
    """Continue every prompt, in batches of similar length, with a cache of keys and values.

    The network comes back in the mode that it was in, and the process's random numbers as they were.

    Args:
        network: A transformers causal language model, or a peft model around one.
        tokenizer: The network's.
        prompts: What to continue; see `Prompt`.
        settings: How to choose tokens.
        batch_size: Prompts at once.

    Returns:
        What the network adds to each prompt, without special tokens, in the prompts' order.

    Raises:
        ValueError: The network cannot generate, a prompt is empty or fills all of the network's positions, or
            `prompts` is no list.
    """
    if isinstance(prompts, str):
        raise ValueError("prompts is a list of prompts: give [prompt] for one")
    check_generates(network)
    encoded = [encode_prompt(tokenizer, prompt) for prompt in prompts]
    stops = set(generation_settings(network, tokenizer, settings).eos_token_id or [])
    answers = generate_ids(network, tokenizer, encoded, settings, batch_size)
    return [
        "".join(incremental_text(tokenizer, ids, takewhile(lambda token: token not in stops, added)))
        for ids, added in zip(encoded, answers, strict=True)
    ]


def generate_ids(
    network: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Sequence[int]],
    settings: Decoding = GREEDY,
    batch_size: int = 16,
) -> list[list[int]]:
    """Continue every prompt of token ids, as `generate` does.

    Returns:
        The new tokens of each, in the prompts' order, with the stop token that ends them, if one does.

    Raises:
        ValueError: The network cannot generate, or a prompt fills all of its positions.
    """
    from lightllm.models.inference import inference, network_device, own_random_numbers

    check_generates(network)
    configuration = generation_settings(network, tokenizer, settings)
    answers: dict[int, list[int]] = {}
    with inference(network), own_random_numbers(network_device(network), settings.seed):
        for group in _batches(network, [len(ids) for ids in prompts], settings.max_new_tokens, batch_size):
            rows = [list(prompts[index]) for index in group]
            answers |= dict(zip(group, _generate_rows(network, rows, configuration), strict=True))
    return [answers[index] for index in range(len(prompts))]


def check_generates(network: nn.Module) -> None:
    """Refuse a network that has no way to generate.

    Raises:
        ValueError: It is no transformers model, or one without a causal head.
    """
    from lightllm.models.anatomy import transformers_network

    base = transformers_network(network)
    if not base.can_generate():
        raise ValueError(f"{type(base).__name__} makes no text: generation needs a causal language model")


def num_new_tokens(network: nn.Module, num_prompt_tokens: int, max_new_tokens: int) -> int:
    """Tokens that can follow a prompt.

    Raises:
        ValueError: None can.
    """
    from lightllm.models.anatomy import max_positions

    positions = max_positions(network)
    if positions is None:
        return max_new_tokens
    learned = _learned_prompt(network)
    virtual = learned.num_virtual_tokens if learned is not None else 0
    if num_prompt_tokens + virtual >= positions:
        both = f"{num_prompt_tokens} tokens and the adapter's {virtual}" if virtual else f"{num_prompt_tokens} tokens"
        raise ValueError(f"a prompt of {both} leaves no room among the network's {positions} positions: shorten it")
    return min(max_new_tokens, positions - num_prompt_tokens - virtual)


def _learned_prompt(network: nn.Module) -> PromptLearningConfig | None:
    """The adapter that puts something before every row, if there is one."""
    from peft import PeftModel, PromptLearningConfig

    configuration = network.active_peft_config if isinstance(network, PeftModel) else None
    return configuration if isinstance(configuration, PromptLearningConfig) else None


def _batches(network: nn.Module, lengths: list[int], max_new_tokens: int, batch_size: int) -> list[list[int]]:
    """Indices of prompts to generate together, so that none's answer depends on the others.

    Prompts of different lengths share a batch, padded on the left, unless padding would show: peft counts positions
    through it behind a learned prompt (not a prefix), and where positions run out, the longest row would end all.
    """
    learned = _learned_prompt(network)
    padded = learned is None or learned.peft_type == "PREFIX_TUNING"
    groups: dict[int | None, list[int]] = {}
    for index in sorted(range(len(lengths)), key=lambda index: lengths[index]):
        fits = num_new_tokens(network, lengths[index], max_new_tokens) == max_new_tokens
        groups.setdefault(None if padded and fits else lengths[index], []).append(index)
    return [
        group[start : start + batch_size] for group in groups.values() for start in range(0, len(group), batch_size)
    ]


def _generate_rows(network: nn.Module, rows: list[list[int]], configuration: GenerationConfig) -> list[list[int]]:
    """New tokens of each row, its stop token the last."""
    import torch

    length = max(len(row) for row in rows)
    padding = configuration.pad_token_id
    input_ids = torch.tensor([[padding] * (length - len(row)) + row for row in rows])
    attention_mask = torch.tensor([[0] * (length - len(row)) + [1] * len(row) for row in rows])
    output = call_generate(network, input_ids, attention_mask, configuration)
    stops = set(configuration.eos_token_id or [])
    return [_until_stop(row, stops) for row in output[:, length:].tolist()]


def _until_stop(tokens: list[int], stops: set[int]) -> list[int]:
    end = next((index + 1 for index, token in enumerate(tokens) if token in stops), len(tokens))
    return tokens[:end]


def call_generate(
    network: nn.Module,
    input_ids: Tensor,
    attention_mask: Tensor,
    configuration: GenerationConfig,
    streamer: BaseStreamer | None = None,
) -> Tensor:
    """Token ids `[batch, seq + new]`, padded behind each row's stop token."""
    from lightllm.models.inference import network_device

    device = network_device(network)
    configuration = copy(configuration)
    assert configuration.max_new_tokens is not None
    configuration.max_new_tokens = num_new_tokens(network, input_ids.shape[1], configuration.max_new_tokens)
    with warnings.catch_warnings():
        # Peft says it of positions that transformers' own generation passes; rows are batched so that it is true.
        warnings.filterwarnings("ignore", "Position ids are not supported")
        return network.generate(  # type: ignore[operator]  # checked by `check_generates`
            input_ids=input_ids.to(device),
            attention_mask=attention_mask.to(device),
            generation_config=configuration,
            streamer=streamer,
        )
