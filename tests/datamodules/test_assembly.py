from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from chat_tokenizer import byte_tokenizer
from data_run import ready, text_data, write_rows

from lightllm.datamodules import Batches, Reading
from lightllm.datamodules.assembly import Assembly
from lightllm.datamodules.run_layout import RunLayout
from lightllm.datamodules.sources import FileSource


def assembly_of(layout: RunLayout | None = None, **fields: Any) -> Assembly:
    defaults: dict[str, Any] = {
        "layout": layout or RunLayout(),
        "batches": Batches(tokens=128),
        "max_length": 32,
        "seed": 3,
        "num_workers": 0,
        "split": True,
        "documents_per_row": 1,
        "tokenizer": byte_tokenizer(),
    }
    return Assembly(**(defaults | fields))


def test_rules_follow_the_layout() -> None:
    layout = RunLayout(rank=1, num_ranks=2, accumulate=4)
    rules = assembly_of(layout, batches=Batches(documents=8)).rules(evaluation=False)
    assert (rules.num_ranks, rules.accumulate, rules.max_length, rules.seed) == (2, 4, 32, 3)
    assert rules.split
    assert not rules.evaluation
    # Where batches have a budget, it does not matter to them how many make a step.
    assert assembly_of(layout).rules(evaluation=False).accumulate == 1
    assert assembly_of(layout, batches=Batches(documents=8)).rules(evaluation=True).accumulate == 1


def test_batch_without_room_for_a_row_is_refused() -> None:
    with pytest.raises(ValueError, match=r"batches.tokens is 16, but a row may take 32 positions"):
        assembly_of(batches=Batches(tokens=16)).rules(evaluation=False)


def test_training_loader_knows_what_its_place_holds_for(tmp_path: Path) -> None:
    documents = ready(text_data(tmp_path)).train_documents
    assembly = assembly_of(RunLayout(epoch_length=0.5, reshuffle=False))
    batches = assembly.plan(documents, evaluation=False)
    loader = assembly.training_loader(batches, "content")
    assert loader.epoch_length == int(0.5 * len(loader))
    assert not loader.reshuffle
    assert loader.settings == {
        "documents": "content",
        "batches.mode": "packed",
        "batches.tokens": 128,
        "batches.documents": None,
        "max_length": 32,
        "seed": 3,
        "split": True,
        "num_ranks": 1,
        "accumulate": 1,
    }


def test_ranks_share_a_plan(tmp_path: Path) -> None:
    documents = ready(text_data(tmp_path)).train_documents
    counts = {rank: assembly_of(RunLayout(rank, 2)).plan(documents, evaluation=True).num_batches() for rank in range(2)}
    assert counts[0] == counts[1] > 0


def test_stream_of_a_rank_has_full_draws_in_its_windows(tmp_path: Path) -> None:
    sources = [FileSource(name) for name in write_rows(tmp_path)]
    layout = RunLayout(rank=1, num_ranks=2, accumulate=4, bounded=True, epoch_length=10)
    assembly = assembly_of(layout, batches=Batches(documents=3), num_workers=2)
    loader = assembly.streaming_loader(list(sources), ready(text_data(tmp_path)).encode, Reading(window=20))
    stream = loader._stream
    assert stream.window == 24
    assert (stream.rank, stream.num_ranks, stream.rules.num_ranks, stream.rules.accumulate) == (1, 2, 1, 4)
    assert loader.epoch_length == 10
    assert loader.settings["sources"] == [["a.jsonl", sources[0].num_bytes()], ["b.jsonl", sources[1].num_bytes()]]
    assert loader.settings["num_ranks"] == 2
    assert loader.settings["num_workers"] == 2


def test_endless_stream_needs_another_end(tmp_path: Path) -> None:
    sources = [FileSource(name) for name in write_rows(tmp_path)]
    with pytest.raises(ValueError, match=r"a stream has no end, .* set trainer.max_steps"):
        assembly_of(RunLayout(num_ranks=2)).streaming_loader(list(sources), lambda row: [], Reading())
