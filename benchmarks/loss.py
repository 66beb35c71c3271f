"""The chunked cross-entropy against `F.cross_entropy` on the full logits: forward and backward, time and peak memory.

    python benchmarks/loss.py [--tokens 400] [--vocab 49152] [--hidden 576] [--dtype bfloat16] [--device cpu]

Both get the same hidden states, all of them targets; the full logits are taken in the inputs' dtype and go into the
cross-entropy as float32, as transformers does. Times are the least of several rounds in which the two alternate, so
that a busy machine slows both; peak memory is what a step adds to a process of its own. The last line is JSON: ours
over the other's, with the head frozen and trained.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import resource
import sys
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor

import torch
import torch.nn.functional as F
from torch import Tensor

from lightllm.losses import linear_cross_entropy

Loss = Callable[[Tensor, Tensor, Tensor], Tensor]


def full(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    """Return the summed cross-entropy from all logits at once."""
    return F.cross_entropy(F.linear(hidden, weight).float(), labels, reduction="sum")


LOSSES: dict[str, Loss] = {"ours": linear_cross_entropy, "full": full}


def inputs(arguments: argparse.Namespace, trained: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Make hidden states `[tokens, hidden]`, the head's weight `[vocab, hidden]` and labels `[tokens]`."""
    torch.manual_seed(0)
    kind = {"dtype": getattr(torch, arguments.dtype), "device": arguments.device}
    hidden = torch.randn(arguments.tokens, arguments.hidden, **kind).requires_grad_()
    weight = torch.randn(arguments.vocab, arguments.hidden, **kind).mul_(arguments.hidden**-0.5)
    labels = torch.randint(0, arguments.vocab, (arguments.tokens,), device=arguments.device)
    return hidden, weight.requires_grad_(trained), labels


def step(loss: Loss, hidden: Tensor, weight: Tensor, labels: Tensor) -> None:
    """Take the gradients of the mean loss."""
    (loss(hidden, weight, labels) / len(labels)).backward()
    hidden.grad = weight.grad = None


def seconds(arguments: argparse.Namespace, trained: bool) -> dict[str, float]:
    """Return the least seconds that a step takes with each loss."""
    given = inputs(arguments, trained)
    least = dict.fromkeys(LOSSES, float("inf"))
    for _ in range(arguments.rounds + 1):
        for name, loss in LOSSES.items():
            start = time.perf_counter()
            step(loss, *given)
            if arguments.device != "cpu":
                torch.cuda.synchronize()
            least[name] = min(least[name], time.perf_counter() - start)
    return least


def peak_bytes(arguments: argparse.Namespace, trained: bool, name: str) -> int:
    """Return how many bytes one step adds to the memory of this process, which must have run no other."""
    given = inputs(arguments, trained)
    if arguments.device != "cpu":
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        step(LOSSES[name], *given)
        return torch.cuda.max_memory_allocated() - before
    # The libraries' own buffers come with the first product, whichever loss takes it.
    step(LOSSES[name], *inputs(argparse.Namespace(**{**vars(arguments), "tokens": 8, "vocab": 64}), trained))
    unit = 1 if sys.platform == "darwin" else 1024
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    step(LOSSES[name], *given)
    return (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * unit


def in_own_process(arguments: argparse.Namespace, trained: bool, name: str) -> int:
    """Call `peak_bytes` in a fresh process."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(peak_bytes, arguments, trained, name).result()


def main() -> None:
    """Measure, print a table, and end with the ratios."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=400, help="target positions in a step")
    parser.add_argument("--vocab", type=int, default=49152)
    parser.add_argument("--hidden", type=int, default=576)
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), default="bfloat16")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--rounds", type=int, default=20)
    arguments = parser.parse_args()
    print(f"{arguments.tokens} tokens, {arguments.vocab} x {arguments.hidden}, {arguments.dtype} on {arguments.device}")
    # Memory first: a process inherits the peak of the one that starts it.
    heads = {"frozen": False, "trained": True}
    peaks = {head: {name: in_own_process(arguments, heads[head], name) for name in LOSSES} for head in heads}
    times = {head: seconds(arguments, heads[head]) for head in heads}
    ratios: dict[str, float] = {}
    for head in heads:
        for name in LOSSES:
            print(f"{head:8} {name:5} {times[head][name] * 1e3:9.1f} ms {peaks[head][name] / 2**20:9.1f} MiB")
        ratios[f"{head}_time_ratio"] = round(times[head]["ours"] / times[head]["full"], 3)
        ratios[f"{head}_peak_memory_ratio"] = round(peaks[head]["ours"] / peaks[head]["full"], 3)
    print(json.dumps(ratios))


if __name__ == "__main__":
    main()
