"""A tokenizer of one's own: byte-level BPE, trained on the training source."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

BEGIN, END, PADDING, MASK = "<|begin|>", "<|end|>", "<|padding|>", "<|mask|>"
"""The special tokens of a trained tokenizer: a document's begin and end, padding, and an encoder's masked tokens."""


@dataclass(frozen=True)
class TrainTokenizer:
    """Train a byte-level BPE tokenizer on the training source, once, into the cache.

    It can encode any text, begins every text with `<|begin|>`, and has `<|end|>` for its end.
    """

    vocab_size: int = 4096
    """Tokens, the 256 bytes and 3 special tokens included."""
    megabytes: int = 100
    """Train on the first so much of the text."""
    encoder: bool = False
    """For an encoder: there is a token `<|mask|>`, and texts, alone or in pairs, all end with `<|end|>`."""

    def train(self, texts: Iterable[str]) -> PreTrainedTokenizerBase:
        """Train; equal texts make equal tokenizers.

        Raises:
            ValueError: The vocabulary has no room for the bytes, or there is no text.
        """
        special = [BEGIN, END, PADDING, *([MASK] if self.encoder else [])]
        smallest = 256 + len(special)
        if self.vocab_size < smallest:
            raise ValueError(f"vocab_size is {self.vocab_size}, but bytes and special tokens alone take {smallest}")
        tokenizer = Tokenizer(models.BPE())
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=self.vocab_size,
            special_tokens=special,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        )
        tokenizer.train_from_iterator(self._first(texts), trainer)
        if tokenizer.get_vocab_size() == smallest:
            raise ValueError("there is no text to train a tokenizer on")
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{BEGIN} $A {END}" if self.encoder else f"{BEGIN} $A",
            pair=f"{BEGIN} $A {END} $B:1 {END}:1" if self.encoder else f"{BEGIN} $A {BEGIN} $B",
            special_tokens=[(token, tokenizer.token_to_id(token)) for token in (BEGIN, END)],
        )
        return PreTrainedTokenizerFast(
            tokenizer_object=tokenizer,
            bos_token=BEGIN,
            eos_token=END,
            pad_token=PADDING,
            clean_up_tokenization_spaces=False,
            **({"cls_token": BEGIN, "sep_token": END, "mask_token": MASK} if self.encoder else {}),
        )

    def train_into(self, folder: Path, texts: Iterable[str]) -> None:
        """Train, and save the tokenizer in a folder as transformers reads it."""
        self.train(texts).save_pretrained(folder)

    def _first(self, texts: Iterable[str]) -> Iterator[str]:
        rest = self.megabytes << 20
        for text in texts:
            if rest <= 0:
                return
            rest -= len(text.encode())
            yield text


def strings_in(value: object) -> Iterator[str]:
    """All strings in a value made of mappings and sequences; the keys are not among them."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for inner in value.values():
            yield from strings_in(inner)
    elif isinstance(value, Sequence):
        for inner in value:
            yield from strings_in(inner)
