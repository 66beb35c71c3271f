"""Draw a run's losses from its metrics.csv: python docs/plot_run.py RUN FILE.svg."""

from __future__ import annotations

import csv
import sys
from pathlib import Path

from lightllm.plot import Curve, plot


def curve(rows: list[dict[str, str]], name: str, label: str, dots: bool = False) -> Curve:
    """One metric over optimizer steps."""
    points = [(float(row["step"]), float(row[name])) for row in rows if row.get(name)]
    return Curve(label, points, dots=dots)


def main(run: str, file: str) -> None:
    """Draw training and validation loss over optimizer steps."""
    with (Path(run) / "metrics.csv").open(newline="") as stream:
        rows = list(csv.DictReader(stream))
    curves = [curve(rows, "train/loss", "training"), curve(rows, "val/loss", "validation", dots=True)]
    Path(file).write_text(plot(curves, "optimizer step", "loss per target token (nats)"), encoding="utf-8")


if __name__ == "__main__":
    main(*sys.argv[1:])
