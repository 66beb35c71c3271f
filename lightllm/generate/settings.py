"""A choice of tokens in transformers' words."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from lightllm.generate.decoding import Decoding

if TYPE_CHECKING:
    from torch import nn
    from transformers import GenerationConfig, PreTrainedTokenizerBase


def generation_settings(network: nn.Module, tokenizer: PreTrainedTokenizerBase, settings: Decoding) -> GenerationConfig:
    """`settings` in transformers' words: every choice is explicit, so that none of the model's own defaults remain."""
    from transformers import GenerationConfig

    from lightllm.models.stop_tokens import stop_token_ids

    stops = stop_token_ids(network, tokenizer)
    padding = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else next(iter(stops), 0)
    sampling: dict[str, Any] = {"do_sample": False, "temperature": 1.0, "top_p": 1.0, "top_k": 50}
    if settings.temperature > 0:
        sampling = {
            "do_sample": True,
            "temperature": settings.temperature,
            "top_p": settings.top_p,
            "top_k": settings.top_k,
        }
    return GenerationConfig(
        **sampling,
        max_new_tokens=settings.max_new_tokens,
        repetition_penalty=settings.repetition_penalty,
        eos_token_id=stops or None,
        pad_token_id=padding,
        bos_token_id=tokenizer.bos_token_id,
        use_cache=True,
    )
