"""What a step of quantization-aware training costs on SmolLM2-135M, beside the same step without.

    python benchmarks/qat.py --train chats.jsonl [--target gguf] [--torchao]

Weights of 4 bits in groups of 32, activations of 8 bits token by token, 8 chats a step: full training in float32, and
LoRA of rank 16 on bfloat16 weights. Both networks are in one process and take their steps in turn, on the same batches,
so that a machine that gets slower does so for both; the figure is the ratio of the median steps, after one that does
not count. `--torchao` also times torchao's own fake quantization of the network that trains in full. The last line is
JSON: our step with quantization over our step without.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import time
from collections.abc import Callable
from typing import Any

ROWS_PER_STEP, RANK, MAX_LENGTH = 8, 16, 512


def batches(train: str, count: int) -> list[Any]:
    """The first training batches of a file of chats, packed."""
    from lightllm.datamodules import Batches, ChatData
    from lightllm.models import load_tokenizer

    data = ChatData(train, max_length=MAX_LENGTH, batches=Batches("packed", documents=ROWS_PER_STEP))
    data.tokenizer = load_tokenizer("smollm2-135m-instruct")
    data.prepare_data()
    data.setup("fit")
    loader = iter(data.train_dataloader())
    return [next(loader) for _ in range(count)]


def stepper(adapted: bool, change: Callable[[Any], None] | None) -> Callable[[Any], None]:
    """A network and its optimizer, as a function that takes one step."""
    import torch

    from lightllm.models import Full, LoRA, Pretrained
    from lightllm.modules import FineTuning

    torch.manual_seed(0)
    dtype = "bfloat16" if adapted else "float32"
    adapter = LoRA(rank=RANK, alpha=2 * RANK) if adapted else Full()
    module = FineTuning(Pretrained("smollm2-135m-instruct", dtype=dtype), adapter)
    module.configure_model()
    if change is not None:
        change(module.built_network)
    trained = [parameter for parameter in module.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-5, fused=True)

    def step(batch: Any) -> None:
        loss = module.criterion(module(batch), batch)
        (loss.sum / loss.weight).backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()

    return step


def round_layers(target: Any) -> Callable[[Any], None]:
    """Our fake quantizers."""
    from lightllm.compression.post_training import quantize_to_nearest
    from lightllm.compression.schemes import make_scheme

    return lambda network: quantize_to_nearest(network, make_scheme("int8_dynamic_int4", target=target), [])


def torchaos_layers(network: Any) -> None:
    """Torchao's fake quantizers of the same numbers."""
    import torch
    from torchao.quantization import Int8DynamicActivationIntxWeightConfig, PerGroup, quantize_
    from torchao.quantization.qat import QATConfig

    base = Int8DynamicActivationIntxWeightConfig(weight_dtype=torch.int4, weight_granularity=PerGroup(32))
    quantize_(
        network,
        QATConfig(base, step="prepare"),
        lambda module, name: isinstance(module, torch.nn.Linear) and ".layers." in name,
    )


def medians(steps: list[Callable[[Any], None]], given: list[Any]) -> list[float]:
    """Seconds of a step of each, which take turns."""
    times: list[list[float]] = [[] for _ in steps]
    for batch in given:
        for step, taken in zip(steps, times, strict=True):
            began = time.perf_counter()
            step(batch)
            taken.append(time.perf_counter() - began)
    return [statistics.median(taken[1:]) for taken in times]


def main() -> None:
    """Time both kinds of training, and print the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--train", required=True)
    parser.add_argument("--target", choices=["torchao", "gguf"], default="torchao")
    parser.add_argument("--torchao", action="store_true")
    parser.add_argument("--steps", type=int, default=8)
    arguments = parser.parse_args()
    from lightllm.modules.heap import keep_freed_memory

    keep_freed_memory()  # as a run does
    given = batches(arguments.train, arguments.steps + 1)
    figures = {}
    for kind in ("full", "lora"):
        steps = [stepper(kind == "lora", None), stepper(kind == "lora", round_layers(arguments.target))]
        if arguments.torchao and kind == "full":
            steps.append(stepper(False, torchaos_layers))
        plain, ours, *theirs = medians(steps, given)
        figures[f"{kind}_ratio"] = round(ours / plain, 3)
        print(f"{kind}: {plain:.2f} s a step without, {ours:.2f} s with quantization", flush=True)
        if theirs:
            figures["torchao_full_ratio"] = round(theirs[0] / plain, 3)
            print(f"{kind}: {theirs[0]:.2f} s with torchao's", flush=True)
        del steps
        gc.collect()
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
