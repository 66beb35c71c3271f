"""From sources to token stores: tokenised once, into the cache."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from lightning.pytorch.utilities import rank_zero_info

from lightllm.datamodules.cache import cached_folder
from lightllm.datamodules.fingerprint import digest_of
from lightllm.datamodules.rows import BadRow, Row
from lightllm.datamodules.sources import Source
from lightllm.datamodules.token_store import TokenStore, write_store
from lightllm.datamodules.tokenization import Encoder, RowEncoder, choose_processes, encode_rows, numbered_rows
from lightllm.models.load import cache_folder

SHOWN = 10
"""Bad rows that an error shows."""


@dataclass(frozen=True)
class Reading:
    """How sources become documents."""

    bad_rows: Literal["stop", "skip"] = "stop"
    """Broken, empty or incomplete rows: stop before training and list them, or skip and count them."""
    limit: int | None = None
    """Read only the first so many rows of a split."""
    val_fraction: float = 0.05
    """Share of the training rows held out for validation when `val` is not given; 0 for none."""
    streaming: bool = False
    """Read and tokenise the training source while training, for sources too big to tokenise first."""
    window: int = 2048
    """Rows that are shuffled and batched together when streaming."""
    processes: int | None = None
    """Processes that tokenise; chosen by the amount of text when None."""
    cache: str | None = None
    """Folder of the token cache; $LIGHTLLM_CACHE or ~/.cache/lightllm when None."""

    def check(self) -> None:
        """Refuse numbers that make no sense.

        Raises:
            ValueError: One is not positive, or `val_fraction` is not a fraction.
        """
        for name, value in (("limit", self.limit), ("window", self.window), ("processes", self.processes)):
            if value is not None and value < 1:
                raise ValueError(f"reading.{name} is {value}: it must be positive")
        if not 0 <= self.val_fraction < 1:
            raise ValueError(f"reading.val_fraction is {self.val_fraction}: it must be at least 0 and less than 1")

    @property
    def cache_root(self) -> Path:
        """The folder of the cache."""
        return cache_folder() if self.cache is None else Path(self.cache).expanduser()


def prepare_store(
    split: str, sources: list[Source], encoder: RowEncoder, settings: object, reading: Reading
) -> TokenStore:
    """The token store of a split: from the cache, or made now.

    Args:
        split: "train", "val" or "test".
        sources: What to read.
        encoder: What makes documents of rows.
        settings: All that the encoder's results depend on beside the rows.
        reading: How to read.

    Raises:
        ValueError: There are bad rows, and they are not to be skipped.
    """
    names = [source.name for source in sources]

    def fill(folder: Path) -> None:
        processes = choose_processes(sources, reading.processes)
        begin = time.perf_counter()
        rank_zero_info(f"{split}: tokenising {_shortened(names)} in {processes} process{'es' * (processes > 1)}")
        parts = encode_rows(numbered_rows(sources, reading.limit), encoder, processes)
        write_store(folder, parts, names, encoder.vocabulary)
        rank_zero_info(f"{split}: tokenised in {time.perf_counter() - begin:.1f} s")

    key = digest_of([[source.digest() for source in sources], settings, reading.limit])
    folder = cached_folder(reading.cache_root, "tokens", key, fill)
    store = TokenStore.open(folder, names)
    if store.encoded.num_bad_rows and reading.bad_rows == "stop":
        raise ValueError(_bad_rows_message(split, store))
    return store


def first_good_row(sources: list[Source], encode: Encoder) -> Row | None:
    """The first row that can be read and encoded, if there is one."""
    for _, row in numbered_rows(sources, None):
        if isinstance(row, Row):
            try:
                encode(row)
            except BadRow:
                continue
            return row
    return None


def _shortened(names: list[str]) -> str:
    return names[0] if len(names) == 1 else f"{len(names)} files ({names[0]}, …)"


def _bad_rows_message(split: str, store: TokenStore) -> str:
    encoded = store.encoded
    shown = [f"  {bad}" for bad in encoded.bad_rows[:SHOWN]]
    if encoded.num_bad_rows > len(shown):
        shown.append(f"  … and {encoded.num_bad_rows - len(shown):,} more")
    return "\n".join(
        [
            f"{split}: {encoded.num_bad_rows:,} of {encoded.num_rows:,} rows can't be used:",
            *shown,
            "Mend them, or have them skipped and counted: reading.bad_rows=skip",
        ]
    )
