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
        "sparsity": None,
    }


def test_a_report_says_what_was_written_and_how_it_compared() -> None:
    merged = ExportReport(Path("run/export"), "merged", "bfloat16", 1_234_567, 0.0312, 0.0021)
    assert merged.describe().splitlines() == [
        "written: run/export (merged, bfloat16, 1.2 MB)",
        "read back: logits differ by 0.031 at most, 0.21% of the largest",
    ]
    adapter = ExportReport(Path("adapter"), "adapter", "float32", 1_000, None, None)
    assert adapter.describe().endswith("read back: the tensors are the same")
