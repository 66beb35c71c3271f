"""Draw a run's losses from its metrics.csv: python docs/plot_run.py RUN FILE.svg (needs matplotlib)."""

from __future__ import annotations

import csv
import sys
from pathlib import Path

import matplotlib
from matplotlib import pyplot


def curve(rows: list[dict[str, str]], name: str) -> tuple[list[int], list[float]]:
    """Steps and values of one metric."""
    points = [(int(row["step"]), float(row[name])) for row in rows if row.get(name)]
    return [step for step, _ in points], [value for _, value in points]


def main(run: str, file: str) -> None:
    """Draw training and validation loss over optimizer steps."""
    matplotlib.rcParams["svg.hashsalt"] = "lightllm"  # the same file from the same numbers
    with (Path(run) / "metrics.csv").open(newline="") as stream:
        rows = list(csv.DictReader(stream))
    figure, axes = pyplot.subplots(figsize=(7, 3.2))
    axes.plot(*curve(rows, "train/loss"), linewidth=1, label="training")
    axes.plot(*curve(rows, "val/loss"), marker="o", label="validation")
    axes.set_xlabel("optimizer step")
    axes.set_ylabel("loss per target token (nats)")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.tight_layout()
    figure.savefig(file, metadata={"Date": None})


if __name__ == "__main__":
    main(*sys.argv[1:])
