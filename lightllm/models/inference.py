"""Using a network in the middle of its training without leaving a trace."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn


@contextmanager
def inference(network: nn.Module) -> Iterator[None]:
    """Evaluation mode without gradients, uncompiled; every module's own mode comes back at the end.

    `no_grad` and not `inference_mode`: tensors that a network keeps (rotary tables, caches) must still serve the
    training that goes on after. Compiled code is left aside, because generation's growing shapes would each compile.

    Args:
        network: Any module.
    """
    training = [module for module in network.modules() if module.training]
    try:
        network.eval()
        with torch.no_grad(), torch.compiler.set_stance("force_eager"):
            yield
    finally:
        for module in training:
            module.training = True


def network_device(network: nn.Module) -> torch.device:
    """Where the network's inputs belong: the device of its first parameter."""
    return next(network.parameters()).device


@contextmanager
def own_random_numbers(device: torch.device, seed: int | None) -> Iterator[None]:
    """Random numbers of their own, so that drawing a sample leaves the training's dropout and shuffling as they were.

    Args:
        device: The accelerator whose generator is set aside beside the CPU's.
        seed: Where the numbers start; None takes a fresh one from the operating system.
    """
    on_cpu = device.type == "cpu"
    with torch.random.fork_rng(devices=[] if on_cpu else [device], device_type="cuda" if on_cpu else device.type):
        if seed is None:
            torch.seed()
        else:
            torch.manual_seed(seed)
        yield
