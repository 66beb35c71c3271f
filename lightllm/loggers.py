"""Where a run's numbers go: always `RUN/metrics.csv`, and TensorBoard or Weights & Biases beside it."""

from __future__ import annotations

import csv
import io
import netrc
import os
import secrets
from argparse import Namespace
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal
from urllib.parse import urlsplit

from lightning.pytorch.loggers import Logger, TensorBoardLogger, WandbLogger
from lightning.pytorch.utilities import rank_zero_info, rank_zero_only, rank_zero_warn
from typing_extensions import override

LoggerName = Literal["csv", "tensorboard", "wandb"]


def loggers(names: Sequence[LoggerName], run_folder: Path, project: str = "lightllm") -> list[Logger]:
    """Make a run's loggers: the CSV file always and first (Lightning takes its folders from the first), then `names`.

    Args:
        names: Which loggers; naming `csv` changes nothing, naming one twice neither.
        run_folder: The run folder; it is created where needed.
        project: Project of a W&B run.

    Raises:
        ValueError: A name is none of the three.
    """
    made: dict[str, Logger] = {"csv": RunCSVLogger(run_folder)}
    for name in names:
        if name == "tensorboard":
            made.setdefault(name, tensorboard_logger(run_folder))
        elif name == "wandb" and name not in made:
            made[name] = wandb_logger(run_folder, project)
        elif name not in made:
            raise ValueError(f"no logger {name!r}: choose from csv, tensorboard, wandb")
    return list(made.values())


def tensorboard_logger(run_folder: Path) -> TensorBoardLogger:
    """Make a TensorBoard logger that writes to `RUN/tensorboard`; a resumed run goes on there."""
    return TensorBoardLogger(save_dir=run_folder, name="", version="tensorboard", default_hp_metric=False)


def wandb_logger(run_folder: Path, project: str = "lightllm") -> WandbLogger:
    """Make a W&B logger whose run goes on when the run folder is resumed: its id is kept in `RUN/wandb_run_id`.

    Without a key (WANDB_API_KEY, or the W&B host in ~/.netrc) and without WANDB_MODE, it writes to `RUN/wandb` only
    and says how to upload that later.
    """
    run_id = _wandb_run_id(run_folder / "wandb_run_id")
    mode = os.environ.get("WANDB_MODE") or ("online" if _has_wandb_key() else "offline")
    if mode == "offline":
        rank_zero_info(
            f"W&B writes offline to {run_folder / 'wandb'}. To upload: wandb login, then "
            f"wandb sync {run_folder / 'wandb'}/offline-run-*-{run_id}"
        )
    return WandbLogger(name=run_folder.resolve().name, save_dir=run_folder, version=run_id, project=project, mode=mode)


def _wandb_run_id(path: Path) -> str:
    """Read the run's id, or draw one; `secrets` leaves the seeded random numbers alone."""
    if path.is_file() and (run_id := path.read_text(encoding="utf-8").strip()):
        return run_id
    run_id = secrets.token_hex(4)
    _write(path, run_id + "\n")
    return run_id


@rank_zero_only
def _write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")


def _has_wandb_key() -> bool:
    if os.environ.get("WANDB_API_KEY"):
        return True
    host = urlsplit(os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai")).hostname
    candidates = [os.environ.get("NETRC"), "~/.netrc", "~/_netrc"]
    for candidate in [Path(name).expanduser() for name in candidates if name]:
        try:
            if candidate.is_file() and host and netrc.netrc(candidate).authenticators(host):
                return True
        except (netrc.NetrcParseError, OSError) as error:
            rank_zero_warn(f"{candidate} cannot be read ({error}), so no W&B key is taken from it")
    return False


class RunCSVLogger(Logger):
    """Writes metrics to `RUN/metrics.csv`, one row a step, and goes on there when the run is resumed.

    (Lightning's own CSVLogger deletes the file of an earlier process.) Every call is on disk when it returns, so that
    a killed process loses nothing; what it left half written is dropped when the file is opened again. Values logged
    later for the step of the last row are added to that row, columns that appear later are empty in the rows before.

    Args:
        run_folder: The run folder; it is created where needed.
    """

    def __init__(self, run_folder: Path) -> None:
        super().__init__()
        self._run_folder = Path(run_folder)
        self._file: _MetricsFile | None = None

    @property
    @override
    def name(self) -> str:
        return ""  # Lightning joins save_dir, name and version to the folder of checkpoints: RUN/checkpoints

    @property
    @override
    def version(self) -> str:
        return ""

    @property
    @override
    def save_dir(self) -> str:
        return str(self._run_folder)

    @property
    def path(self) -> Path:
        """The file."""
        return self._run_folder / "metrics.csv"

    @override
    @rank_zero_only
    def log_hyperparams(self, params: dict[str, Any] | Namespace, *args: Any, **kwargs: Any) -> None:
        """Do nothing: the configuration is in `RUN/config.yaml`."""

    @override
    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        file = self._opened()
        file.write({"step": file.last_step + 1 if step is None else step, **metrics})

    @rank_zero_only
    def rewind(self, step: int) -> None:
        """Drop the rows of `step` and later ones: a run that resumes there writes them again.

        `RewindMetrics` calls this when training starts.
        """
        if self.path.exists():
            self._opened().rewind(step)

    def _opened(self) -> _MetricsFile:
        if self._file is None:
            self._file = _MetricsFile(self.path)
        return self._file


class _MetricsFile:
    """A CSV file that grows in rows and columns; its first column is `step`."""

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self._path = path
        self._columns: list[str] = ["step"]
        self._last: dict[str, str] = {}
        self._last_offset = 0
        self._rewrite(self._read_sound_rows())

    @property
    def last_step(self) -> int:
        return int(self._last.get("step", -1))

    def write(self, row: Mapping[str, Any]) -> None:
        """Append a row, or add its values to the last one if that has the same step."""
        if new := [column for column in row if column not in self._columns]:
            rows = self._read_sound_rows()
            self._columns += new
            self._rewrite(rows)
        values = {column: str(value) for column, value in row.items()}
        with self._path.open("r+b") as file:
            if self._last.get("step") == values["step"]:
                values = self._last | values
                file.seek(self._last_offset)
            else:
                self._last_offset = file.seek(0, os.SEEK_END)
            file.write(self._line(values))
            file.truncate()
        self._last = values

    def rewind(self, step: int) -> None:
        """Drop the rows of `step` and later ones."""
        self._rewrite([row for row in self._read_sound_rows() if int(row["step"]) < step])

    def _read_sound_rows(self) -> list[dict[str, str]]:
        """Read the columns and the rows, without a row that a crash cut off: it lacks its line end, or fields."""
        text = self._path.read_text(encoding="utf-8", errors="replace") if self._path.exists() else ""
        table = list(csv.reader(text[: text.rfind("\n") + 1].splitlines()))
        self._columns = table[0] if table else ["step"]
        if self._columns[0] != "step":
            raise ValueError(f"{self._path} is no metrics file: its first column is {self._columns[0]!r}, not 'step'")
        sound = [fields for fields in table[1:] if len(fields) == len(self._columns) and fields[0].isdecimal()]
        dropped = len(text.splitlines()) - len(sound) - 1
        if dropped > 0:
            rank_zero_warn(f"{self._path}: dropped {dropped} row(s) that were not written to their end")
        return [dict(zip(self._columns, fields, strict=True)) for fields in sound]

    def _rewrite(self, rows: list[dict[str, str]]) -> None:
        """Replace the file in one move, so that at any moment there is a whole one."""
        header = dict(zip(self._columns, self._columns, strict=True))
        lines = [self._line(row) for row in (header, *rows)]
        temporary = self._path.with_suffix(".csv.tmp")
        temporary.write_bytes(b"".join(lines))
        temporary.replace(self._path)
        self._last = rows[-1] if rows else {}
        self._last_offset = sum(map(len, lines[:-1]))

    def _line(self, row: Mapping[str, str]) -> bytes:
        buffer = io.StringIO()
        csv.DictWriter(buffer, self._columns, restval="", lineterminator="\n").writerow(row)
        return buffer.getvalue().encode("utf-8")
