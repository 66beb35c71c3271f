from __future__ import annotations

import json
import os
import signal
import time
from dataclasses import replace
from multiprocessing import get_context
from pathlib import Path

import pytest

from lightllm.compression.ledger import Ledger, LedgerRow, as_records, ratios, reference

DENSE = LedgerRow(
    step="dense",
    training_step=0,
    parameters=1000,
    nonzero_parameters=1000,
    weight_bytes=4000,
    loss=2.0,
    target_tokens=50,
    tokens_per_second=20.0,
    peak_memory=8000,
    device="cpu",
)
PRUNED = replace(DENSE, step="WandaPruning", training_step=7, nonzero_parameters=500, loss=2.25)
FILE = replace(
    DENSE, step="export.gguf", training_step=None, weight_bytes=562, tokens_per_second=30.0, peak_memory=2000
)


def test_rows_are_read_as_they_were_written(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path / "run" / "ledger.jsonl")
    assert ledger.rows == []
    for row in (DENSE, PRUNED, FILE):
        ledger.add(row)
    assert ledger.rows == [DENSE, PRUNED, FILE]
    assert [json.loads(line)["step"] for line in ledger.path.read_text().splitlines()] == [
        "dense",
        "WandaPruning",
        "export.gguf",
    ]
    assert [path.name for path in ledger.path.parent.iterdir()] == ["ledger.jsonl"]


def test_a_key_has_one_row_which_stays_where_it_was(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path / "ledger.jsonl")
    for row in (DENSE, PRUNED, FILE):
        ledger.add(row)
    again = replace(PRUNED, loss=2.3)
    ledger.add(again)
    ledger.add(replace(FILE, weight_bytes=9))
    assert ledger.rows == [DENSE, again, replace(FILE, weight_bytes=9)]
    later = replace(PRUNED, training_step=8)
    ledger.add(later)
    assert ledger.rows[-1] == later


def test_a_resumed_run_writes_later_rows_again(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path / "ledger.jsonl")
    for row in (DENSE, PRUNED, FILE):
        ledger.add(row)
    ledger.rewind(7)
    assert ledger.rows == [DENSE, PRUNED, FILE]
    ledger.rewind(6)
    assert ledger.rows == [DENSE, FILE]


def test_what_an_earlier_run_left_is_dropped(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path / "ledger.jsonl")
    ledger.keep([DENSE.key])
    for row in (DENSE, PRUNED, FILE):
        ledger.add(row)
    ledger.keep([PRUNED.key, ("trained", 9)])
    assert ledger.rows == [PRUNED]


def test_the_same_network_is_known_by_its_weights_and_its_loss() -> None:
    assert DENSE.shows_the_network_of(replace(DENSE, tokens_per_second=None, step="teacher", device=None))
    for change in ({"loss": 2.0000001}, {"nonzero_parameters": 999}, {"weight_bytes": 2000}, {"target_tokens": 49}):
        assert not DENSE.shows_the_network_of(replace(DENSE, **change))


def test_a_line_that_is_no_row_is_told_by_its_place(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path / "ledger.jsonl")
    ledger.add(DENSE)
    with ledger.path.open("a") as file:
        file.write('{"step": "dense"}\n')
    with pytest.raises(ValueError, match=r"ledger\.jsonl:2: this is no row"):
        _ = ledger.rows
    ledger.path.write_text("[]\n")
    with pytest.raises(ValueError, match=r"ledger\.jsonl:1: this is no row"):
        _ = ledger.rows


def test_a_row_of_a_later_version_is_read(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path / "ledger.jsonl")
    ledger.add(DENSE)
    ledger.path.write_text(json.dumps({**json.loads(ledger.path.read_text()), "colour": "blue"}) + "\n")
    assert ledger.rows == [DENSE]


def _write_for_ever(path: Path) -> None:
    ledger = Ledger(path)
    step = 0
    while True:
        ledger.add(replace(DENSE, training_step=step % 50))
        step += 1


def test_at_any_moment_there_is_a_whole_file(tmp_path: Path) -> None:
    path = tmp_path / "ledger.jsonl"
    for milliseconds in range(0, 60, 6):
        process = get_context("fork").Process(target=_write_for_ever, args=(path,))
        process.start()
        while not path.exists():
            time.sleep(0.001)
        time.sleep(milliseconds / 1000)
        os.kill(process.pid or 0, signal.SIGKILL)
        process.join()
        rows = Ledger(path).rows
        assert len({row.key for row in rows}) == len(rows) > 0


def test_ratios_are_quotients_and_the_loss_a_difference() -> None:
    assert DENSE.bits_per_weight == 32
    assert FILE.bits_per_weight == pytest.approx(4.496)
    assert ratios(PRUNED, DENSE) == {
        "parameters_ratio": 1,
        "nonzero_parameters_ratio": 0.5,
        "weight_bytes_ratio": 1,
        "tokens_per_second_ratio": 1,
        "peak_memory_ratio": 1,
        "loss_increase": 0.25,
    }
    assert ratios(FILE, DENSE)["weight_bytes_ratio"] == pytest.approx(0.1405)
    assert ratios(FILE, DENSE)["tokens_per_second_ratio"] == 1.5
    unmeasured = replace(PRUNED, loss=None, peak_memory=None)
    assert ratios(unmeasured, DENSE)["loss_increase"] is None
    assert ratios(unmeasured, DENSE)["peak_memory_ratio"] is None


def test_records_are_compared_with_the_dense_row_if_there_is_one() -> None:
    assert reference([PRUNED, DENSE]) is DENSE
    records = as_records([DENSE, FILE])
    assert records[1]["weight_bytes_ratio"] == pytest.approx(0.1405)
    assert records[1]["bits_per_weight"] == pytest.approx(4.496)
    assert "weight_bytes_ratio" not in as_records([PRUNED])[0]
