"""Where a datamodule's tokenizer comes from: a name, an object, training, or the network."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path

from lightning.pytorch import Trainer
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from lightllm.datamodules.cache import cached_folder
from lightllm.datamodules.fingerprint import digest_of
from lightllm.datamodules.rows import BadRow, Row
from lightllm.datamodules.sources import Source
from lightllm.datamodules.tokenization import numbered_rows
from lightllm.datamodules.train_tokenizer import TrainTokenizer
from lightllm.models.load import load_tokenizer


def load_chosen(choice: str | None, trainer: Trainer | None) -> PreTrainedTokenizerBase:
    """Load the tokenizer of a name, or that of the network that is trained.

    Raises:
        ValueError: There is none under the name, or there is no network, or it has none.
    """
    if choice is not None:
        return load_tokenizer(choice)
    module = None if trainer is None else trainer.lightning_module
    source = getattr(module, "tokenizer_source", None)
    if source is None:
        raise ValueError(
            "there is no tokenizer: the network brings none along, so name one (data.tokenizer), or have one trained "
            "on the data (data.tokenizer.vocab_size)"
        )
    return load_tokenizer(source)


def trained_tokenizer(
    choice: TrainTokenizer, sources: Sequence[Source], root: Path, texts: Callable[[Row], Iterable[str]]
) -> PreTrainedTokenizerBase:
    """A tokenizer trained on sources: from the cache, or trained now.

    Args:
        choice: How to train.
        sources: What its texts come from.
        root: Folder of the cache.
        texts: The texts of a row; bad rows have none.
    """

    def all_texts() -> Iterator[str]:
        for _, row in numbered_rows(sources, None):
            if isinstance(row, Row):
                with suppress(BadRow):  # found again, and dealt with, when rows are encoded
                    yield from texts(row)

    key = digest_of([asdict(choice), [source.digest() for source in sources]])
    folder = cached_folder(root, "tokenizers", key, lambda folder: choice.train_into(folder, all_texts()))
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert isinstance(tokenizer, PreTrainedTokenizerBase)
    return tokenizer
