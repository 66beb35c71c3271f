"""Networks and tokenizers small enough to compare in full, random but always the same after the test's seed."""

from __future__ import annotations

from functools import cache

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import nn
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
)

TEXT = """The whale, like all things that are mighty, wears a false brow to the common world. Call me Ishmael.
Überall ist Maß und Ziel; naïve façades, 東京の海, 🐋🐳. def f(x):\n    return x ** 2  # squared\n"""
POSITIONS = 96


@cache
def _byte_level() -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=320,
        special_tokens=["<eos>", "<pad>", "<turn>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([TEXT], trainer)
    return tokenizer


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level BPE of at most 320 tokens, trained on `TEXT`, with an end and a padding token."""
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(_byte_level().to_str()), eos_token="<eos>", pad_token="<pad>"
    )


def tiny_llama(vocab: int = 320, tied: bool = True) -> LlamaForCausalLM:
    """Two llama layers of width 32, with two heads to a key/value head and weights large enough to matter."""
    configuration = LlamaConfig(
        vocab_size=vocab,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=POSITIONS,
        tie_word_embeddings=tied,
        initializer_range=0.3,
        bos_token_id=None,
        eos_token_id=0,
    )
    return LlamaForCausalLM(configuration).eval()


def tiny_qwen2(vocab: int = 320) -> Qwen2ForCausalLM:
    """Two qwen2 layers, whose biases are not zero."""
    configuration = Qwen2Config(
        vocab_size=vocab,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=POSITIONS,
        tie_word_embeddings=False,
        initializer_range=0.3,
        bos_token_id=None,
        eos_token_id=0,
    )
    network = Qwen2ForCausalLM(configuration).eval()
    for name, parameter in network.named_parameters():
        if name.endswith("bias"):
            nn.init.normal_(parameter)
    return network


def tiny_gpt2(vocab: int = 320) -> GPT2LMHeadModel:
    """Two gpt2 layers: learned positions, transposed weights, a tied head."""
    configuration = GPT2Config(
        vocab_size=vocab,
        n_embd=32,
        n_layer=2,
        n_head=4,
        n_positions=POSITIONS,
        initializer_range=0.3,
        bos_token_id=0,
        eos_token_id=0,
    )
    return GPT2LMHeadModel(configuration).eval()


def token_rows(vocab: int = 320, rows: int = 3, length: int = 17) -> torch.Tensor:
    """Random token ids `[rows, length]`."""
    return torch.randint(3, vocab, (rows, length), generator=torch.Generator().manual_seed(1))
