"""Whether an exported network computes what the trained one does."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from lightllm.compression.effects import inputs_as_they_are
from lightllm.export.merge import prevailing_dtype
from lightllm.models.anatomy import transformers_network, vocabulary_size
from lightllm.models.inference import inference, network_device
from lightllm.models.progress import no_progress_bars

TOLERANCE = {torch.float64: 1e-5, torch.float32: 1e-5, torch.float16: 1e-2, torch.bfloat16: 5e-2}
"""The difference of logits that is never questioned, as a share of the largest logit, by the coarser dtype of two
networks: what rounding makes of a network of usual depth, whose sums are added up in another order."""

ROUNDINGS = 8.0
"""A larger difference is still one of rounding if it is at most this many times what a network's logits move by when
its own weights are rounded once more; that may be much, in few bits and with large weights."""


class Difference(NamedTuple):
    """How far two networks' logits are apart."""

    absolute: float
    """The largest difference of two logits."""
    relative: float
    """The same as a share of the largest logit."""


def verify(folder: Path, network: nn.Module, dtype: torch.dtype) -> Difference:
    """Load an exported folder with plain transformers and compare its logits with the network's.

    What was trained with rounded activations is compared without: ordinary layers compute with them as they are.

    Args:
        folder: An exported Hugging Face folder.
        network: What was exported.
        dtype: The export's.

    Raises:
        ValueError: See `checked_difference`.
    """
    base = transformers_network(network)
    loader = AutoModelForCausalLM if base.can_generate() else type(base)
    with no_progress_bars():
        exported: nn.Module = loader.from_pretrained(folder, dtype=dtype)
    with inputs_as_they_are(network):
        return checked_difference(network, exported.to(network_device(network)), dtype)


def checked_difference(network: nn.Module, exported: nn.Module, dtype: torch.dtype) -> Difference:
    """Compare a network with its export, read back; the export's weights may be changed in doing so.

    Raises:
        ValueError: They differ by more than `TOLERANCE`, and by more than `ROUNDINGS` explain.
    """
    coarser = max(dtype, prevailing_dtype(network), key=lambda dtype: torch.finfo(dtype).eps)
    found = difference(network, exported)
    if not found.relative <= TOLERANCE[coarser]:
        allowed = ROUNDINGS * _noise(exported, torch.finfo(coarser).eps)
        if not found.absolute <= allowed:
            raise ValueError(
                f"the export's logits differ from the network's by {found.absolute:.3g}, {found.relative:.3g} of the "
                f"largest one, where rounding in {coarser} explains {allowed:.3g}: it would not be what was trained"
            )
    return found


def _noise(network: nn.Module, epsilon: float) -> float:
    """By how much logits move when every weight does, at random, by up to `epsilon` of itself; the weights stay so."""
    rows = random_rows(network)
    before = outputs(network, rows)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in network.parameters():
            share = torch.rand(parameter.shape, generator=generator).to(parameter.device) * 2 - 1
            parameter.copy_(parameter.float() * (1 + epsilon * share))
    return (outputs(network, rows) - before).abs().max().item()


def difference(network: nn.Module, other: nn.Module) -> Difference:
    """Compare two networks' logits (or hidden states, without a head) on rows of random tokens."""
    rows = random_rows(network)
    ours, theirs = outputs(network, rows), outputs(other, rows)
    absolute = (ours - theirs).abs().max().item()
    return Difference(absolute, absolute / ours.abs().max().item())


def outputs(network: nn.Module, rows: Tensor) -> Tensor:
    """Logits `[batch, seq, vocab]` of token rows `[batch, seq]` in float32, or hidden states without a head."""
    device = network_device(network)
    with inference(network), torch.autocast(device.type, enabled=False):
        result = network(input_ids=rows.to(device))
    return (result.logits if "logits" in result else result.last_hidden_state).float()


def random_rows(network: nn.Module) -> Tensor:
    """Random token ids, `[4, 32]`."""
    return torch.randint(vocabulary_size(network), (4, 32), generator=torch.Generator().manual_seed(0))
