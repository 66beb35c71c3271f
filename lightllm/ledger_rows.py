"""Rows of the compression ledger: of a network in training, and of an export on the disk."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

from torch import nn
from transformers import PreTrainedModel

from lightllm.batch import IGNORE_INDEX, TextBatch
from lightllm.compression.ledger import LedgerRow
from lightllm.compression.low_rank_network import factored_layers
from lightllm.evaluate import evaluate_text
from lightllm.export.factored import has_our_code, with_code
from lightllm.export.merge import merged_network
from lightllm.measure import GenerationTest, count_weights, measure_file, measure_network, weight_files
from lightllm.models.anatomy import learns_a_prompt, unwrapped

PROMPT_TOKENS = 16


class Generation(NamedTuple):
    """How generation of a network in training is measured."""

    test: GenerationTest
    beside: Path
    """The folder in which the network is written for a moment."""
    known: Sequence[LedgerRow] = ()
    """Rows that may be of the same network: theirs is then not measured again."""


def row_of_network(
    step: str,
    training_step: int,
    network: nn.Module,
    batches: Sequence[TextBatch],
    generation: Generation | None = None,
) -> LedgerRow:
    """Measure a network where it is; it is left as it was.

    Args:
        step: See `LedgerRow`.
        training_step: See `LedgerRow`.
        network: Any; one that is adapted, masked or fake-quantized counts as what an export would hold, and thin
            matrices as such.
        batches: What the loss is measured on.
        generation: How that is measured; not at all when None.
    """
    found = evaluate_text(network, None, batches) if has_targets(batches) else None
    plain = _plain(network)
    count = count_weights(network if plain is None else plain)
    row = LedgerRow(
        step=step,
        training_step=training_step,
        parameters=count.parameters,
        nonzero_parameters=count.nonzero_parameters,
        weight_bytes=count.num_bytes,
        loss=None if found is None else found.loss,
        target_tokens=None if found is None else found.num_tokens,
    )
    if generation is None or plain is None or not plain.can_generate():
        return row
    for known in generation.known:
        if known.tokens_per_second is not None and known.shows_the_network_of(row):
            return replace(row, **{name: getattr(known, name) for name in _OF_GENERATION})
    code = with_code if factored_layers(plain) else None
    measured = measure_network(plain, generation.test, generation.beside, code)
    return replace(row, **{name: getattr(measured, name) for name in _OF_GENERATION})


_OF_GENERATION = ("tokens_per_second", "peak_memory", "device")


def row_of_file(path: Path, batches: Sequence[TextBatch], test: GenerationTest | None) -> LedgerRow:
    """Measure an export as plain transformers loads it.

    Raises:
        ValueError: It cannot be loaded.
    """
    found = measure_file(path, test, batches if has_targets(batches) else (), trust_remote_code=has_our_code(path))
    return LedgerRow(
        step=path.name,
        training_step=None,
        parameters=found.parameters,
        nonzero_parameters=found.nonzero_parameters,
        weight_bytes=sum(file.stat().st_size for file in weight_files(path)),
        loss=found.loss,
        target_tokens=found.target_tokens,
        tokens_per_second=found.tokens_per_second,
        peak_memory=found.peak_memory,
        device=found.device,
    )


def generation_test(batches: Sequence[TextBatch], new_tokens: int) -> GenerationTest | None:
    """Generation from the beginning of the first document; None if there is none."""
    for batch in batches:
        first = batch["input_ids"][0, :PROMPT_TOKENS]
        return GenerationTest(first[batch["document_ids"][0, :PROMPT_TOKENS] >= 0].tolist(), new_tokens)
    return None


def has_targets(batches: Sequence[TextBatch]) -> bool:
    """Whether there is anything to measure a loss on."""
    return any(bool((batch["labels"] != IGNORE_INDEX).any()) for batch in batches)


def _plain(network: nn.Module) -> PreTrainedModel | None:
    """What an export would hold; None for a module of the user's own, and for one with a learned prompt."""
    if not isinstance(unwrapped(network), PreTrainedModel) or learns_a_prompt(network):
        return None
    return merged_network(network, keep_factored=True)
