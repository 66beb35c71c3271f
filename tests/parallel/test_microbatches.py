from __future__ import annotations

import pytest
import torch
from staged_run import packed_rows

from lightllm.batch import IGNORE_INDEX, PADDING_DOCUMENT
from lightllm.parallel.microbatches import equal_microbatches, split_rows

FIELDS = ("input_ids", "labels", "position_ids", "document_ids")


def test_rows_are_shared_out_in_their_order() -> None:
    batch = packed_rows(5, seed=1)
    parts = split_rows(batch, 3)
    assert [len(part["labels"]) for part in parts] == [2, 2, 1]
    for field in FIELDS:
        assert torch.equal(torch.cat([part[field] for part in parts]), batch[field])  # type: ignore[literal-required]
    assert len(split_rows(packed_rows(2, seed=1), 3)) == 2


@pytest.mark.parametrize("rows", [1, 2, 4, 5, 8])
def test_equal_parts_are_filled_up_with_rows_of_nothing(rows: int) -> None:
    batch = packed_rows(rows, seed=2)
    parts = equal_microbatches(batch, 4)
    assert len(parts) == 4
    assert {part["labels"].shape for part in parts} == {(-(-rows // 4), batch["labels"].shape[1])}
    real = torch.cat([(part["document_ids"] != PADDING_DOCUMENT).any(1) for part in parts])
    assert int(real.sum()) == rows
    for field in FIELDS:
        rows_of = torch.cat([part[field] for part in parts])  # type: ignore[literal-required]
        assert torch.equal(rows_of[real], batch[field])  # type: ignore[literal-required]
    labels = torch.cat([part["labels"] for part in parts])
    assert (labels[~real] == IGNORE_INDEX).all()
    positions = torch.cat([part["position_ids"] for part in parts])[~real]
    assert (positions == torch.arange(batch["labels"].shape[1])).all(), "rows of one document need no mask"
