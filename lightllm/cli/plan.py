"""`lightllm plan`: how to spread a run over devices, before there are any.

Nothing heavy is imported here: help is to be quick.
"""

from __future__ import annotations

import argparse

from lightllm.cli.errors import run_explained
from lightllm.cli.plan_request import Request

HELP = """usage: lightllm plan --config FILE [--config OVERLAY …] --hardware MACHINE [--any.field VALUE …]
       lightllm plan --config FILE --here

Say what a run would take of each device, and how long, for every sensible way to spread it: copies, shards, tensor
and pipeline parallelism, micro-batches, recomputed activations. Nothing is loaded and nothing trained. The fastest that
fits is first; what does not fit says why.

  --hardware MACHINE         h100-8 (a node of eight), a100-8x16 (sixteen such nodes), or a YAML or JSON file:
                             {devices, nodes, memory (GiB), teraflops: {bfloat16, float32}, memory_bandwidth, link,
                             network (GB/s)}, from which `like: h100` takes what is not said
  --here                     this machine instead: its GPUs, or its processor's cores, which are measured
  --target_batch_tokens N    tokens of an optimizer step over all devices; what the configuration's own batches come to
                             on so many devices by default
  --document_tokens N        how long documents are in packed rows; as long as a row by default
  --write FILE               write the best as an overlay: lightllm fit --config … --config FILE
  --top N                    how many ways to show (12)

The other arguments are those of `lightllm fit`. Memory is that of the fullest device; tokens/s are of each device. What
callbacks do (pruning, quantization) is not counted, of a distillation neither the teacher; every position is taken for
a target, every row for full."""


def main(verb: str, arguments: list[str]) -> int:
    """Run the verb; the exit status."""
    if {"-h", "--help"} & set(arguments):
        print(HELP)
        return 0
    return run_explained(f"lightllm {verb}", lambda: _plan(arguments))


def _plan(arguments: list[str]) -> int:
    request, rest = read_request(arguments)
    from lightllm.cli.planning import plan

    plan(request, rest)
    return 0


def read_request(arguments: list[str]) -> tuple[Request, list[str]]:
    """What is asked, and the arguments that are the configuration's.

    Raises:
        ValueError: A value is of another type, or no machine is named.
    """
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    parser.add_argument("--hardware")
    parser.add_argument("--here", action="store_true")
    parser.add_argument("--target_batch_tokens", type=int)
    parser.add_argument("--document_tokens", type=int)
    parser.add_argument("--write")
    parser.add_argument("--top", type=int, default=12)
    try:
        known, rest = parser.parse_known_args(arguments)
    except argparse.ArgumentError as error:
        raise ValueError(str(error)) from error
    if (known.hardware is None) == (not known.here):
        raise ValueError("name the machine: --hardware h100-8, --hardware FILE, or --here (and not both)")
    for name in ("target_batch_tokens", "document_tokens", "top"):
        value = getattr(known, name)
        if value is not None and value < 1:
            raise ValueError(f"{name} is {value}: give a positive number")
    return Request(**vars(known)), rest
