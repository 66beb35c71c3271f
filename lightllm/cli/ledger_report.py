"""The compression ledger of a run, completed by its exports, as a table, files and a plot."""

from __future__ import annotations

import csv
import io
import json
from pathlib import Path

from rich.console import Console

from lightllm.callbacks import CompressionLedger
from lightllm.checkpoint_io import read_entry
from lightllm.cli.rebuild import load, rebuild_callbacks, rebuild_data, unbuilt
from lightllm.compression.ledger import REFERENCE, TEACHER, TRAINED, Ledger, LedgerRow, as_records
from lightllm.compression.ledger_table import markdown, table
from lightllm.ledger_rows import Generation, generation_test, row_of_file, row_of_network
from lightllm.measure import GenerationTest
from lightllm.models import BuildRequest
from lightllm.modules import Distillation
from lightllm.plot import Curve, plot
from lightllm.runs import RunFolder


def report(run: str, checkpoint: str = "best") -> None:
    """Add the exports that lie in a run folder to its ledger, print it, and write it there for others to read.

    The rows are those that `CompressionLedger` took during the run; without it, they are taken now: of the network as
    it comes, and as a checkpoint has it. Exports are loaded by plain transformers, each in a process of its own.
    Written are ledger.json, ledger.csv, ledger.md, and quality_against_size.svg, loss over bytes.

    Args:
        run: A run folder.
        checkpoint: Of a run without a ledger: best, newest or a file.

    Raises:
        ValueError: There is no such run, or an export cannot be loaded.
    """
    folder = RunFolder(run).require()
    ledger, bench = Ledger(folder.ledger), Bench(folder)
    if not ledger.rows:
        bench.take_rows(ledger, checkpoint)
    exports = folder.whole_exports
    names = {path.name for path in exports}
    ledger.keep([row.key for row in ledger.rows if row.training_step is not None or row.step in names])
    for path in exports:
        print(f"measuring {path}", flush=True)
        ledger.add(bench.row_of(path))
    Console().print(table(ledger.rows))
    _write(folder, ledger.rows)


def enter_export(model: str, path: Path) -> None:
    """Add an export to the ledger of the run in whose folder it lies, and print that, if there is one."""
    folder = RunFolder(model)
    ledger = Ledger(folder.ledger)
    if not folder.exists or not ledger.rows or path.name not in {one.name for one in folder.whole_exports}:
        return
    ledger.add(Bench(folder).row_of(path))
    Console().print(table(ledger.rows))


class Bench:
    """What networks of a run are measured on: the documents and the settings of its `CompressionLedger`.

    Args:
        run: The run.
    """

    def __init__(self, run: RunFolder) -> None:
        self._run = run
        settings = next(iter(rebuild_callbacks(run, CompressionLedger)), CompressionLedger())
        data = rebuild_data(run)
        self._batches = data.excerpt("val", settings.limit)
        prompts = self._batches or data.excerpt("train", 1)
        self._test: GenerationTest | None = None
        if settings.generation:
            self._test = generation_test(prompts, settings.new_tokens)

    def row_of(self, path: Path) -> LedgerRow:
        """The row of an export."""
        return row_of_file(path, self._batches, self._test)

    def take_rows(self, ledger: Ledger, checkpoint: str) -> None:
        """Measure the network as it comes, if it can be built again, and as the checkpoint has it."""
        generation = None if self._test is None else Generation(self._test, self._run.path)
        module = unbuilt(self._run)
        if module.plan.network.restorable:
            network = module.plan.network.build(BuildRequest(module.task, module.tokenizer)).eval()
            ledger.add(row_of_network(REFERENCE, 0, network, self._batches, generation))
        if isinstance(module, Distillation) and module.teacher_network.restorable:
            network = module.teacher_network.build(BuildRequest(module.task, module.tokenizer)).eval()
            ledger.add(row_of_network(TEACHER, 0, network, self._batches, generation))
        file = self._run.checkpoint(checkpoint)
        trained, step = load(str(self._run.path), checkpoint).network, read_entry(file, "global_step", 0)
        ledger.add(row_of_network(TRAINED, step, trained, self._batches, generation))


def _write(run: RunFolder, rows: list[LedgerRow]) -> None:
    records = as_records(rows)
    text = io.StringIO()
    writer = csv.DictWriter(text, list(records[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(records)
    written = {
        "ledger.json": json.dumps(records, indent=2) + "\n",
        "ledger.csv": text.getvalue(),
        "ledger.md": markdown(rows),
    }
    if any(row.loss is not None for row in rows):
        written["quality_against_size.svg"] = draw(rows)
    for name, content in written.items():
        (run.path / name).write_text(content, encoding="utf-8")
    print(f"written: {', '.join(str(run.path / name) for name in written)}")


def draw(rows: list[LedgerRow]) -> str:
    """Loss per target token over the bytes of the weights, a point a row, as an SVG document."""
    shown = [row for row in rows if row.loss is not None]
    parts = {
        "in the run": [row for row in shown if row.training_step is not None and row.step != TEACHER],
        "exports": [row for row in shown if row.training_step is None],
        "teacher": [row for row in shown if row.step == TEACHER],
    }
    curves = [
        Curve(
            label,
            [(row.weight_bytes / 1e6, row.loss) for row in part if row.loss is not None],
            [row.step for row in part],
            line=label == "in the run",
            dots=True,
        )
        for label, part in parts.items()
        if part
    ]
    return plot(curves, "weights (MB)", "loss per target token (nats)")
