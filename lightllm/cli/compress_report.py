"""The verb compress-report.

Nothing heavy is imported here, not even for type checking: the parser follows such imports, and help is to be quick.
"""

from __future__ import annotations

from lightllm.cli.arguments import parse
from lightllm.cli.errors import run_explained

USAGE = "RUN [--checkpoint best | newest | FILE]"


def main(verb: str, arguments: list[str]) -> int:
    """Run the verb; the exit status."""
    return run_explained(f"lightllm {verb}", lambda: compress_report(**parse(verb, compress_report, USAGE, arguments)))


def compress_report(run: str, checkpoint: str = "best") -> int:
    """Say what each step of compressing a run's network saved and cost; the exports in the run folder are rows too.

    Args:
        run: A run folder.
        checkpoint: What the trained network of a run without CompressionLedger is: best, newest or a file.
    """
    from lightllm.cli.ledger_report import report

    report(run, checkpoint)
    return 0
