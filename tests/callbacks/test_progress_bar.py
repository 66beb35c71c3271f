from __future__ import annotations

import io
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import rich
from rich.console import Console
from tiny_run import TinyModule, tiny_batches, tiny_loader, tiny_trainer

from lightllm.callbacks import ProgressBar, Throughput
from lightllm.callbacks.progress_bar import metrics_text, time_left

pytestmark = pytest.mark.filterwarnings("ignore::lightning.fabric.utilities.warnings.PossibleUserWarning")


class Screen:
    """What the process writes, as a terminal or as a file."""

    def __init__(self) -> None:
        self.file = io.StringIO()

    def be(self, terminal: bool) -> None:
        rich.reconfigure(file=self.file, force_terminal=terminal, width=200, color_system=None)

    @property
    def lines(self) -> list[str]:
        """All states of all lines, without control sequences."""
        text = re.sub(r"\x1b\[[0-9?;]*[A-Za-z]", "", self.file.getvalue())
        return [line.rstrip() for line in re.split(r"[\r\n]+", text) if line.strip()]


@pytest.fixture
def screen() -> Iterator[Screen]:
    before = rich.get_console().__dict__.copy()
    yield Screen()
    rich.get_console().__dict__ = before


def fit(folder: Path, callbacks: list[Any], val: bool = True, **fields: Any) -> None:
    trainer = tiny_trainer(folder, callbacks, enable_progress_bar=True, **fields)
    trainer.fit(TinyModule(), tiny_loader(tiny_batches(6)), tiny_loader(tiny_batches(2)) if val else None)


def test_a_file_gets_a_line_now_and_then(tmp_path: Path, screen: Screen) -> None:
    screen.be(terminal=False)
    fit(tmp_path, [ProgressBar(every_n_steps=4), Throughput(peak_flops=1.0)], max_epochs=2, val_check_interval=3)
    number = r"\d[\d.]*"
    starts = [re.match(r"(validated at )?step \d+/12:", line) for line in screen.lines]
    assert [match.group() if match else None for match in starts] == [
        "validated at step 3/12:",
        "step 4/12:",
        "validated at step 6/12:",
        "step 8/12:",
        "validated at step 9/12:",
        "step 12/12:",
        "validated at step 12/12:",
    ]
    form = rf"step 8/12: loss {number}, .*[\d,]+ tokens/s.*, 0:00:\d\d left"
    assert re.fullmatch(form, screen.lines[3])
    assert "val/loss" in screen.lines[-1]


def test_a_terminal_gets_one_line_that_changes(tmp_path: Path, screen: Screen) -> None:
    screen.be(terminal=True)
    fit(tmp_path, [ProgressBar(refresh_seconds=0), Throughput(peak_flops=1.0)], val_check_interval=3)
    shown = [line for line in screen.lines if re.search(r"\d+/", line)]
    steps = [re.search(r"(train|validate) .* (\d+/\S+)", line) for line in shown]
    seen = [match.groups() for match in steps if match]
    training = [count for stage, count in seen if stage == "train" and count != "0/?"]
    assert list(dict.fromkeys(training)) == [f"{step}/6" for step in range(1, 7)]
    assert ("validate", "2/2") in seen
    assert re.search(r"6/6 loss [\d.]+, .*[\d,]+ tokens/s.* 0:00:00 left$", shown[-1])


def test_a_terminal_is_not_redrawn_more_often_than_asked(tmp_path: Path, screen: Screen) -> None:
    screen.be(terminal=True)
    fit(tmp_path, [ProgressBar(refresh_seconds=1000)], val=False)
    counts = {match.group() for line in screen.lines if (match := re.search(r"\d+/\S+", line))}
    assert counts <= {"0/?", "1/6", "6/6"}
    assert "6/6" in counts


def test_accumulated_batches_are_one_step(tmp_path: Path, screen: Screen) -> None:
    screen.be(terminal=False)
    fit(tmp_path, [ProgressBar(every_n_steps=1)], val=False, accumulate_grad_batches=4, max_epochs=2)
    assert [line.split(":")[0] for line in screen.lines] == ["step 1/4", "step 2/4", "step 3/4", "step 4/4"]


def test_max_steps_is_the_end(tmp_path: Path, screen: Screen) -> None:
    screen.be(terminal=False)
    fit(tmp_path, [ProgressBar(every_n_steps=2)], val=False, max_steps=4, max_epochs=-1)
    assert [line.split(":")[0] for line in screen.lines] == ["step 2/4", "step 4/4"]


@pytest.mark.parametrize("verb", ["validate", "test", "predict"])
def test_other_verbs_count_batches_in_a_terminal(tmp_path: Path, screen: Screen, verb: str) -> None:
    class Measured(TinyModule):
        test_step = TinyModule.validation_step

        def predict_step(self, batch: Any, batch_idx: int) -> int:
            return batch_idx

    screen.be(terminal=True)
    trainer = tiny_trainer(tmp_path, [ProgressBar(refresh_seconds=0)], enable_progress_bar=True)
    getattr(trainer, verb)(Measured(), tiny_loader(tiny_batches(3)))
    counts = [match.group(1) for line in screen.lines if (match := re.search(rf"{verb} .* (\d/\d)", line))]
    assert list(dict.fromkeys(counts)) == ["1/3", "2/3", "3/3"]


def test_the_line_ends_when_training_fails(tmp_path: Path, screen: Screen) -> None:
    class Failing(TinyModule):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            raise RuntimeError("failed")

    screen.be(terminal=True)
    bar = ProgressBar()
    with pytest.raises(RuntimeError, match="failed"):
        tiny_trainer(tmp_path, [bar], enable_progress_bar=True).fit(Failing(), tiny_loader(tiny_batches(1)))
    assert bar._line is None
    assert screen.file.getvalue().endswith("\x1b[?25h")  # the cursor is back


def test_another_rank_shows_nothing(tmp_path: Path, screen: Screen) -> None:
    screen.be(terminal=False)
    bar = ProgressBar(every_n_steps=1)
    bar.disable()
    fit(tmp_path, [bar])
    assert screen.lines == []


def test_metrics_in_words() -> None:
    metrics = {"train/loss": 2.34567, "val/loss": 2.5, "throughput/tokens_per_second": 12345.6}
    assert metrics_text(metrics) == "loss 2.346, val/loss 2.5, 12,346 tokens/s"


def test_time_left() -> None:
    assert time_left(60.0, 30, 130, 1000) == "0:29:00"
    assert time_left(60.0, 30, 1001, 1000) == "0:00:00"
    assert time_left(0.0, 0, 100, 1000) is None
    assert time_left(60.0, 30, 130, None) is None


def test_no_lines_at_all_is_refused() -> None:
    assert isinstance(rich.get_console(), Console)
    with pytest.raises(ValueError, match="every_n_steps is at least 1, not 0"):
        ProgressBar(every_n_steps=0)
