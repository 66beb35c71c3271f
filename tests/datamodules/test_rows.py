from __future__ import annotations

import pickle

from lightllm.datamodules.rows import BadRow, Origin


def test_origin_reads_as_file_and_line() -> None:
    assert str(Origin("data/chats.jsonl", 17)) == "data/chats.jsonl:17"


def test_bad_row_says_where_and_why_also_in_another_process() -> None:
    bad = pickle.loads(pickle.dumps(BadRow(Origin("a.jsonl", 3), "empty")))
    assert str(bad) == "a.jsonl:3: empty"
    assert (bad.origin, bad.reason) == (Origin("a.jsonl", 3), "empty")
