"""Counting the arithmetic of a training step, and what the device could do at best.

Only products are counted, a multiply and an add as two operations; recomputation (gradient checkpointing, a loss that
forms its logits twice) is not: these are *model* FLOPs, as in PaLM (arXiv:2204.02311, appendix B).
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from transformers import PretrainedConfig

_DENSE_HALF_PEAKS: dict[str, float] = {
    # Dense bfloat16/float16 with float32 accumulation, from the vendors' data sheets (which print the sparse figure,
    # twice as much, first). The first name that occurs in the device's name wins, so the longer names come first.
    "GB200": 2.5e15,
    "B200": 2.25e15,
    "GH200": 989.4e12,
    "H200": 989.4e12,
    "H100 NVL": 835e12,
    "H100 PCIe": 756e12,
    "H100": 989.4e12,
    "H20": 148e12,
    "A100": 312e12,
    "A800": 312e12,
    "A30": 165e12,
    "L40S": 362e12,
    "L40": 181e12,
    "L4": 121e12,
    "A10G": 70e12,
    "A10": 125e12,
    "A40": 149.7e12,
    "RTX 6000 Ada": 364e12,
    "RTX A6000": 154.8e12,
    "RTX 5090": 209.5e12,
    "RTX 4090": 165.2e12,
    "RTX 3090": 71e12,
    "MI325X": 1307.4e12,
    "MI300X": 1307.4e12,
    "MI250X": 191.5e12,  # one of its two dies, which is what torch calls a device
}


@dataclass(frozen=True)
class StepFlops:
    """What a training step (forward and backward) costs, by what it is proportional to."""

    per_token: float
    """FLOPs per token that enters the network, without its output head."""
    per_target: float
    """FLOPs of the output head per target token: the loss applies it to targets only."""
    per_pair: float
    """FLOPs of attention per pair of positions (a query and a key that it sees)."""

    def total(self, num_tokens: float, num_targets: float, num_pairs: float) -> float:
        """Return the FLOPs of the steps that saw these counts."""
        return self.per_token * num_tokens + self.per_target * num_targets + self.per_pair * num_pairs


def step_flops(network: nn.Module, head: Tensor, attention_width: int = 0) -> StepFlops:
    """Count a network's training FLOPs from its weights and from which of them are trained.

    With `N` the weights that multiply a token (matrices; embeddings are looked up, not multiplied), a token costs
    `2 N` in the forward pass, `2 N_back` for the gradients of activations and `2 N_trained` for the gradients of
    weights. `N_back` are the weights from the first trained one on, in the order of the modules: below it nothing is
    propagated. So `6 N` when everything is trained, about `4 N` with LoRA, less with frozen lower layers. The output
    head follows the same rule, per target. Attention costs `4 * attention_width` per pair forward and twice that
    backward. A mixture of experts is counted as if every expert were used.

    Args:
        network: The network, with its output head; its modules are registered in the order of the computation.
        head: The output head's weight `[vocab, hidden]`; it may be the input embedding's (tied).
        attention_width: Heads times head size, summed over the layers; 0 leaves attention out.
    """
    forward = backward = trained = 0
    reached = any(
        parameter.requires_grad and parameter is not head
        for module in network.modules()
        if isinstance(module, nn.Embedding)
        for parameter in module.parameters(recurse=False)
    )
    for module in network.modules():
        parameters = list(module.parameters(recurse=False))
        if any(parameter is head for parameter in parameters):
            reached |= head.requires_grad and isinstance(module, nn.Embedding)
            continue
        reached |= any(parameter.requires_grad for parameter in parameters)
        for parameter in parameters:
            size = _products(module, parameter)
            forward += size
            backward += size * reached
            trained += size * parameter.requires_grad
    return StepFlops(
        per_token=2.0 * (forward + backward + trained),
        per_target=2.0 * head.numel() * (1 + reached + head.requires_grad),
        per_pair=4.0 * attention_width * (1 + 2 * backward / max(forward, 1)),
    )


def _products(module: nn.Module, parameter: nn.Parameter) -> int:
    """Return how many multiply-adds a parameter costs per token."""
    if parameter.ndim < 2 or isinstance(module, nn.Embedding):
        # A 4-bit weight is packed, two to a byte, in one column, so a linear layer is asked for its shape instead.
        return 0
    if isinstance(module, nn.Linear):
        return module.in_features * module.out_features
    return parameter.numel()


def attention_width(config: PretrainedConfig) -> int:
    """Return heads times head size, summed over the layers, as `step_flops` takes it."""
    text = config.get_text_config()
    head_size = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    return int(text.num_hidden_layers * text.num_attention_heads * head_size)


def known_peak(device_name: str, dtype: torch.dtype) -> float | None:
    """Return a GPU's dense peak in FLOP/s from the data sheet, `None` where it is not known.

    Args:
        device_name: What `torch.cuda.get_device_name` says.
        dtype: The type of the products; only bfloat16 and float16 are listed.
    """
    if dtype not in (torch.bfloat16, torch.float16):
        return None
    return next((peak for name, peak in _DENSE_HALF_PEAKS.items() if name in device_name), None)


def measured_peak(device: torch.device, dtype: torch.dtype, seconds: float = 0.3) -> float:
    """Measure the FLOP/s of a large square matrix product: the best of as many as fit into `seconds`.

    It draws no random numbers, so a run's course does not depend on it.
    """
    size = 4096 if device.type == "cuda" else 1024
    left = torch.ones(size, size, device=device, dtype=dtype)
    right = torch.ones(size, size, device=device, dtype=dtype)
    best = float("inf")
    deadline = time.perf_counter() + seconds
    while time.perf_counter() < deadline or best == float("inf"):
        start = time.perf_counter()
        torch.mm(left, right)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        best = min(best, time.perf_counter() - start)
    return 2.0 * size**3 / best


def peak_flops(device: torch.device, dtype: torch.dtype) -> float:
    """Return the device's FLOP/s for products of a type: from the data sheet if known, else measured (0.3 s)."""
    if device.type == "cuda" and (peak := known_peak(torch.cuda.get_device_name(device), dtype)) is not None:
        return peak
    return measured_peak(device, dtype)
