from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tiny_networks import TEXT, tiny_llama, tiny_tokenizer
from torch import Tensor, nn

from lightllm.batch import IGNORE_INDEX, Document, TextBatch, pack_documents
from lightllm.callbacks import Predictions
from lightllm.callbacks.predictions import document_losses
from lightllm.generate import Decoding, generate


def rows_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def trainer_in(folder: Path, rank: int = 0) -> Any:
    datamodule = SimpleNamespace(describe_document=lambda split, document: f"{split}.jsonl:{document + 1}")
    return SimpleNamespace(
        default_root_dir=str(folder), is_global_zero=rank == 0, global_rank=rank, datamodule=datamodule
    )


def predict(callback: Predictions, trainer: Any, module: Any, *batches: tuple[Any, TextBatch]) -> None:
    callback.on_predict_start(trainer, module)
    for index, (outputs, batch) in enumerate(batches):
        callback.on_predict_batch_end(trainer, module, outputs, batch, index)
    callback.on_predict_end(trainer, module)


def document(index: int, length: int, first_target: int = 1) -> Document:
    generator = torch.Generator().manual_seed(index)
    tokens = torch.randint(3, 300, (length,), generator=generator)
    return Document(tokens, [place >= first_target for place in range(length)], index)


@pytest.fixture
def packed() -> TextBatch:
    """Documents 4, 1 and 2 in two rows, with padding; some tokens are no targets."""
    return pack_documents([[document(4, 6), document(1, 5, first_target=3)], [document(2, 9, first_target=4)]], 12)


def log_probabilities(batch: TextBatch, seed: int = 0) -> Tensor:
    drawn = -torch.rand(batch["labels"].shape, generator=torch.Generator().manual_seed(seed))
    return torch.where(batch["labels"] == IGNORE_INDEX, 0.0, drawn)


def test_losses_are_means_over_each_documents_targets(tmp_path: Path, packed: TextBatch) -> None:
    drawn = log_probabilities(packed)
    predict(Predictions(), trainer_in(tmp_path), None, (drawn, packed))
    rows = rows_of(tmp_path / "predictions.jsonl")
    assert [(row["source"], row["tokens"]) for row in rows] == [
        ("predict.jsonl:2", 2),
        ("predict.jsonl:3", 5),
        ("predict.jsonl:5", 5),
    ]
    assert rows[2]["loss"] == pytest.approx(-drawn[0, :5].mean().item())
    assert rows[0]["loss"] == pytest.approx(-drawn[0, 7:9].mean().item())
    assert rows[1]["loss"] == pytest.approx(-drawn[1, 3:8].mean().item())


def test_a_document_in_pieces_is_one_line(tmp_path: Path) -> None:
    one, other = pack_documents([[document(3, 4)]]), pack_documents([[document(3, 7)]])
    first, second = log_probabilities(one, 1), log_probabilities(other, 2)
    predict(Predictions(), trainer_in(tmp_path), None, (first, one), (second, other))
    (row,) = rows_of(tmp_path / "predictions.jsonl")
    assert row == {
        "source": "predict.jsonl:4",
        "loss": pytest.approx(-(first.sum() + second.sum()).item() / 9),
        "tokens": 9,
    }


def test_documents_without_targets_are_left_out() -> None:
    batch = pack_documents([[document(0, 4, first_target=9), document(1, 4)]])
    assert set(document_losses(log_probabilities(batch), batch)) == {1}


def test_generations_begin_where_the_first_target_is(tmp_path: Path) -> None:
    tokenizer, network = tiny_tokenizer(), tiny_llama()
    question, answer, rest = (tokenizer(text).input_ids for text in ("Call me", " Ishmael.", " And you? Ahab."))
    targets = [False] * len(question) + [True] * len(answer) + [False] * 4 + [True] * (len(rest) - 4)
    batch = pack_documents([[document(5, 8), Document(question + answer + rest, targets, 0)]])
    module = SimpleNamespace(built_network=network, tokenizer=tokenizer)
    decoding = Decoding(max_new_tokens=5)
    predict(Predictions("generations", decoding), trainer_in(tmp_path), module, (None, batch))
    row = rows_of(tmp_path / "predictions.jsonl")[0]
    assert (row["prompt"], row["target"]) == ("Call me", " Ishmael."), "the first answer, not the second"
    assert row["generation"] == generate(network, tokenizer, [question], decoding)[0]


def test_text_goes_to_the_file_as_it_is(tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer()
    ids = tokenizer(TEXT).input_ids[:60]
    batch = pack_documents([[Document(ids, [place >= 50 for place in range(60)], 0)]])
    module = SimpleNamespace(built_network=tiny_llama(), tokenizer=tokenizer)
    predict(Predictions("generations", Decoding(max_new_tokens=2)), trainer_in(tmp_path), module, (None, batch))
    assert rows_of(tmp_path / "predictions.jsonl")[0]["prompt"] == tokenizer.decode(ids[:50])


def test_each_rank_has_its_file(tmp_path: Path, packed: TextBatch) -> None:
    predict(Predictions(), trainer_in(tmp_path, rank=1), None, (log_probabilities(packed), packed))
    assert [file.name for file in tmp_path.iterdir()] == ["predictions-1.jsonl"]


def test_what_was_found_before_a_failure_is_written(tmp_path: Path, packed: TextBatch) -> None:
    callback, trainer, module = Predictions(), trainer_in(tmp_path), nn.Module()
    callback.on_exception(trainer, module, KeyboardInterrupt())  # type: ignore[arg-type]
    assert list(tmp_path.iterdir()) == []
    callback.on_predict_batch_end(trainer, module, log_probabilities(packed), packed, 0)  # type: ignore[arg-type]
    callback.on_exception(trainer, module, KeyboardInterrupt())  # type: ignore[arg-type]
    assert len(rows_of(tmp_path / "predictions.jsonl")) == 3
