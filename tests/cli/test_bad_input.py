"""What is wrong with rows, data and settings stops a run before its first step, and says where and what to do."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from command_line import lightllm, refused, save_chats
from tiny_networks import tiny_tokenizer

from lightllm.cli import main

GOOD = {"messages": [{"role": "user", "content": "What?"}, {"role": "assistant", "content": "That."}]}


def line(*roles: str) -> str:
    return json.dumps({"messages": [{"role": role, "content": "Some words."} for role in roles]})


BAD_LINES = {
    "broken JSON": (b'{"messages": [', "rows.jsonl:3: "),
    "missing field": (b'{"messages": [{"role": "user"}, {"role": "assistant", "content": "a"}]}', "rows.jsonl:3: "),
    "empty": (b'{"messages": []}', "rows.jsonl:3: "),
    "wrong role order": (line("assistant", "user").encode(), "rows.jsonl:3: "),
    "unknown role": (line("user", "robot").encode(), "rows.jsonl:3: "),
    "invalid UTF-8": (b'{"messages": [{"role": "user", "content": "\xff\xfe"}]}', "rows.jsonl:3: "),
}


def write_rows(bad: bytes) -> Path:
    good = json.dumps(GOOD).encode()
    file = Path("rows.jsonl")
    file.write_bytes(b"\n".join([good, good, bad, *[good] * 12]) + b"\n")
    return file


@pytest.mark.parametrize("case", BAD_LINES)
def test_a_bad_row_is_named_by_file_and_line(
    case: str, material: Any, workplace: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bad, place = BAD_LINES[case]
    file = write_rows(bad)
    told = refused(capsys, "fit", "--config", material.recipe, "--data.train", file)
    assert "train: 1 of 15 rows can't be used:" in told
    assert place in told
    assert "reading.bad_rows=skip" in told
    assert not Path("runs/recipe").exists()


def test_bad_rows_are_skipped_and_counted_when_asked(
    material: Any, workplace: Path, capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    file = write_rows(b"{")
    skip = ["--data.reading.bad_rows", "skip", "--trainer.fast_dev_run", 1]
    with caplog.at_level("INFO"):
        lightllm("fit", "--config", material.recipe, "--data.train", file, *skip)
    assert "1 bad row" in capfd.readouterr().err + caplog.text


def test_data_and_network_that_do_not_fit_together(
    material: Any, workplace: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    larger = tiny_tokenizer()
    larger.add_tokens([f"<word{index}>" for index in range(9)])
    larger.save_pretrained("larger")
    Path("empty.jsonl").write_text("")
    recipe = ["fit", "--config", material.recipe]
    cases = {
        ("--data.tokenizer", "larger"): "the tokenizer has 329 tokens and the network embeds 320",
        ("--data.max_length", "2000"): "data.max_length is 2000, but the network has positions for 1024 only",
        ("--data.train", "empty.jsonl"): "empty.jsonl",
        ("--data.batches", "{documents: null, tokens: 100}"): "batches.tokens is 100, but a row may take 128 positions",
    }
    for wrong, told in cases.items():
        assert told in refused(capsys, *recipe, *wrong)
    assert not Path("runs/recipe").exists()


def test_a_loss_that_is_no_number_names_its_documents_and_the_last_good_checkpoint(
    material: Any, workplace: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    chats = save_chats(workplace / "chats.jsonl", 20)
    arguments = ["--data.train", str(chats), "--run", "run", "--checkpoint.every_n_train_steps", "1"]
    explode = ["--model.optimizer.lr", "1.0e+30", "--trainer.val_check_interval", "4"]
    assert main(["fit", "--config", str(material.recipe), *arguments, *explode]) == 1
    told = capsys.readouterr().err
    assert "is not finite; its batch holds" in told
    assert f"{chats}:" in told
    assert "the last good checkpoint is run/checkpoints/step=" in told
    assert "Traceback" not in told
