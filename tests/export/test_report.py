import json
from pathlib import Path

from lightllm.export.report import MARKER, ExportReport


def test_a_report_is_left_without_the_path_of_this_machine(tmp_path: Path) -> None:
    ExportReport(tmp_path / "mine", "adapter", "float32", 123, None, None).write(tmp_path)
    assert json.loads((tmp_path / MARKER).read_text()) == {
        "path": "mine",
        "layout": "adapter",
        "dtype": "float32",
        "num_bytes": 123,
        "max_logit_difference": None,
        "relative_logit_difference": None,
    }
