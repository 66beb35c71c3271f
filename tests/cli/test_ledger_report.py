from __future__ import annotations

from dataclasses import replace
from xml.etree import ElementTree

from lightllm.cli.ledger_report import draw
from lightllm.compression.ledger import LedgerRow

DENSE = LedgerRow(step="dense", training_step=0, parameters=10, nonzero_parameters=10, weight_bytes=2_000_000, loss=2.0)


def test_each_row_with_a_loss_is_a_point_and_the_run_a_line() -> None:
    rows = [
        DENSE,
        replace(DENSE, step="teacher", weight_bytes=8_000_000, loss=1.0),
        replace(DENSE, step="trained", training_step=9, loss=2.5),
        replace(DENSE, step="export", training_step=None, weight_bytes=1_000_000, loss=2.6),
        replace(DENSE, step="unmeasured", training_step=3, loss=None),
    ]
    root = ElementTree.fromstring(draw(rows))
    tags = [one.tag.rpartition("}")[2] for one in root.iter()]
    assert tags.count("circle") == 4
    texts = {one.text for one in root.iter() if one.text}
    assert {"dense", "teacher", "trained", "export", "in the run", "exports", "weights (MB)"} <= texts
    assert "unmeasured" not in texts
    lines = [one for one in root.iter() if one.attrib.get("stroke-width") == "1.3"]
    assert len(lines) == 1
