"""Whether an exported network computes what the trained one does."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from lightllm.export.merge import prevailing_dtype
from lightllm.models.anatomy import transformers_network, vocabulary_size
from lightllm.models.inference import inference, network_device
from lightllm.models.progress import no_progress_bars

TOLERANCE = {torch.float64: 1e-5, torch.float32: 1e-5, torch.float16: 1e-2, torch.bfloat16: 1e-1}
"""The largest difference of logits, as a share of the largest logit, by the coarser dtype of the two networks.

A merged weight is rounded once more in half precision, and the products are added up in another order: about the
rounding of the dtype, times what the layers make of it.
"""


class Difference(NamedTuple):
    """How far two networks' logits are apart."""

    absolute: float
    """The largest difference of two logits."""
    relative: float
    """The same as a share of the largest logit."""


def verify(folder: Path, network: nn.Module, dtype: torch.dtype) -> Difference:
    """Load an exported folder with plain transformers and compare its logits with the network's.

    Args:
        folder: An exported Hugging Face folder.
        network: What was exported.
        dtype: The export's.

    Raises:
        ValueError: They differ by more than `TOLERANCE`.
    """
    base = transformers_network(network)
    loader = AutoModelForCausalLM if base.can_generate() else type(base)
    with no_progress_bars():
        exported = loader.from_pretrained(folder, dtype=dtype)
    assert isinstance(exported, nn.Module)
    found = difference(network, exported.to(network_device(network)))
    tolerance = max(TOLERANCE[dtype], TOLERANCE[prevailing_dtype(network)])
    if not found.relative <= tolerance:
        raise ValueError(
            f"the export's logits differ from the network's by {found.absolute:.3g}, {found.relative:.3g} of the "
            f"largest one, and {tolerance:.3g} is allowed for {dtype}: it would not be what was trained"
        )
    return found


def difference(network: nn.Module, other: nn.Module) -> Difference:
    """Compare two networks' logits (or hidden states, without a head) on rows of random tokens."""
    generator = torch.Generator().manual_seed(0)
    rows = torch.randint(vocabulary_size(network), (4, 32), generator=generator)
    ours, theirs = outputs(network, rows), outputs(other, rows)
    absolute = (ours - theirs).abs().max().item()
    return Difference(absolute, absolute / ours.abs().max().item())


def outputs(network: nn.Module, rows: Tensor) -> Tensor:
    """Logits `[batch, seq, vocab]` of token rows `[batch, seq]` in float32, or hidden states without a head."""
    device = network_device(network)
    with inference(network), torch.autocast(device.type, enabled=False):
        result = network(input_ids=rows.to(device))
    return (result.logits if "logits" in result else result.last_hidden_state).float()
