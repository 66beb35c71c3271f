"""The verb quantize: few bits after training.

Nothing heavy is imported here, not even for type checking: the parser follows such imports, and help is to be quick.
"""

from __future__ import annotations

from lightllm.cli.arguments import parse
from lightllm.cli.errors import run_explained
from lightllm.cli.quantize_request import Request

USAGE = "MODEL --scheme SCHEME [--method round | gptq] [--format torchao | gguf | merged] [--to PATH]"


def main(verb: str, arguments: list[str]) -> int:
    """Run the verb; the exit status."""
    return run_explained(f"lightllm {verb}", lambda: _quantize(Request(**parse(verb, Request, USAGE, arguments))))


def _quantize(request: Request) -> int:
    from lightllm.cli.post_training import quantize

    quantize(request)
    return 0
